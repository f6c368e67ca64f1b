# shellcheck shell=bash disable=SC2034
# Sourced by sweep.sh, slurm_sweep.sh and list_failed.sh, from the repository's folder: lists the runs
# of a sweep and those that are not finished, and gives the command and the log of each. Variables,
# with their defaults:
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
# those that all others may contradict; `python`; and `program`, the command that takes them.
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
list_pending() {
    local number line lines
    lines=$(printf '%s\n' "${runs[@]}" |
        "$python" scripts/list_pending.py ${common[@]+"${common[@]}"} "$@") || exit $?
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

# Sets `command`, the command of run $1 with the arguments that follow.
set_command() {
    local own
    read -ra own <<<"${runs[$1]}"
    shift
    command=("${program[@]}" "${first[@]}" ${common[@]+"${common[@]}"} "${own[@]}" "$@")
}

# Sets `log`, the log of run $1 with the arguments that follow. Its name tells which run it is.
set_log() {
    log=${runs[$1]}
    shift
    log="$log $*"
    log=${log//--/}
    log=${log//[^a-zA-Z0-9.+-]/_}
    log=${log:0:200} # names may have 255 bytes
    log=${LOGS:-logs}/${log%_}.txt
}

# Prints those variables of a sweep that are set, as assignments in front of a command.
carried() {
    local name names="DATA DATASETS METHODS SHOTS SEEDS RUNS PROCESSES LOGS RESTARTS PYTHON"
    for name in $names ${!CONFIG_*}; do
        if [ -n "${!name:-}" ]; then
            printf '%s=%q ' "$name" "${!name}"
        fi
    done
}
