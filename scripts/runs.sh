# shellcheck shell=bash disable=SC2034
# Sourced by sweep.sh, slurm_sweep.sh and failures.sh, from the repository's folder: which runs a
# sweep has, which of them are left, how each is started, and how its log is called. Variables, with
# their defaults:
#
#     METHODS   so lora adam
#     DATASETS  the eleven (digits, the embedded one, needs no DATA)
#     SHOTS     1 2 4 8 16
#     SEEDS     1 2 3
#     DATA      folder of the datasets (DATASETS.md)
#     CONFIG_so, CONFIG_lora, CONFIG_adam   configuration file of one method
#     RUNS      a file of such lines, in place of all but DATA (scripts/experiment.py writes one)
#     PROCESSES processes of one run, under torchrun: as many as it has GPUs
#     LOGS      folder of the logs (logs)
#     PYTHON    the interpreter (.venv's where there is one)

# Sets `runs`, a line of arguments of main.py for each run; `common`, the arguments of all; `first`,
# those that all others may contradict; `python`; and `program`, what such arguments are given to.
list_runs() {
    local line method dataset shot seed config
    local eleven="imagenet sun397 fgvc eurosat stanford_cars food101 oxford_pets oxford_flowers \
caltech101 dtd ucf101"
    python=${PYTHON:-python3}
    if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
        python=.venv/bin/python
    fi
    program=("$python" main.py)
    if [ -n "${PROCESSES:-}" ]; then
        program=("$python" -m torch.distributed.run --standalone)
        program+=(--nproc_per_node "$PROCESSES" -- main.py)
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

# Sets `left`, the numbers of those runs that are not finished with these arguments.
list_unfinished() {
    local number line lines
    lines=$(printf '%s\n' "${runs[@]}" |
        "$python" scripts/unfinished.py ${common[@]+"${common[@]}"} "$@") || exit $?
    left=()
    {
        IFS= read -r line <&3
        for number in "${!runs[@]}"; do # both are in the same order
            if [ "${runs[number]}" = "$line" ]; then
                left+=("$number")
                IFS= read -r line <&3 || break
            fi
        done
    } 3<<<"$lines"
}

# Sets `command`, which makes run $1 with the arguments that follow.
set_command() {
    local own
    read -ra own <<<"${runs[$1]}"
    shift
    command=("${program[@]}" "${first[@]}" ${common[@]+"${common[@]}"} "${own[@]}" "$@")
}

# Sets `log`, the file of run $1 with the arguments that follow; its name tells them.
set_log() {
    log=${runs[$1]}
    shift
    log="$log $*"
    log=${log//--/}
    log=${log//[^a-zA-Z0-9.+-]/_}
    log=${log:0:200} # names may have 255 bytes
    log=${LOGS:-logs}/${log%_}.txt
}

# Prints what of the environment makes a sweep what it is, as assignments in front of a command.
carried() {
    local name
    for name in DATA DATASETS METHODS SHOTS SEEDS RUNS PROCESSES LOGS RESTARTS PYTHON ${!CONFIG_*}; do
        if [ -n "${!name:-}" ]; then
            printf '%s=%q ' "$name" "${!name}"
        fi
    done
}
