# shellcheck shell=bash disable=SC2034
# Sourced by sweep.sh and slurm_sweep.sh: lists the runs. It sets `runs`, a line of arguments of
# main.py for each; `common`, the arguments of all; `first`, those that all others may contradict;
# and `python`. Variables, with their defaults:
#
#     METHODS   so lora adam
#     DATASETS  the eleven (digits, the embedded one, needs no DATA)
#     SHOTS     1 2 4 8 16
#     SEEDS     1 2 3
#     DATA      folder of the datasets (DATASETS.md)
#     CONFIG_so, CONFIG_lora, CONFIG_adam   configuration file of one method
#     RUNS      a file of such lines, in place of all but DATA (scripts/experiment.py writes one)

list_runs() {
    local line method dataset shot seed config
    local eleven="imagenet sun397 fgvc eurosat stanford_cars food101 oxford_pets oxford_flowers \
caltech101 dtd ucf101"
    python=${PYTHON:-python3}
    if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
        python=.venv/bin/python
    fi
    first=(--resume --no-save_weights) # hundreds of weights would fill a disk
    common=() # expanded as ${common[@]+...}: old versions of bash take an empty array for unset
    if [ -n "${DATA:-}" ]; then
        common=(--root_path "$DATA")
    fi
    runs=()
    if [ -n "${RUNS:-}" ]; then
        while IFS= read -r line; do
            runs+=("$line")
        done <"$RUNS"
        return
    fi
    for dataset in ${DATASETS:-$eleven}; do
        if [ -z "${DATA:-}" ] && [ "$dataset" != digits ]; then
            echo "$0: set DATA to the folder of the datasets (DATASETS.md)" >&2
            exit 2
        fi
        for shot in ${SHOTS:-1 2 4 8 16}; do
            for seed in ${SEEDS:-1 2 3}; do
                for method in ${METHODS:-so lora adam}; do
                    config="CONFIG_$method"
                    config=${!config:+--config ${!config} }
                    runs+=("$config--method $method --dataset $dataset --shots $shot --seed $seed")
                done
            done
        done
    done
}
