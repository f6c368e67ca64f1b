# shellcheck shell=bash disable=SC2034
# Sourced by sweep.sh, slurm_sweep.sh and list_failed.sh, from the repository's root: the runs of a
# sweep, with the command and the log of each. Variables, with their defaults:
#
#     METHODS   so lora adam
#     DATASETS  the eleven; digits (with the argument --config configs/digits.yaml) and folders of
#               your own images need no DATA. A blank in a path is written "\ ", as in RUNS
#     SHOTS     1 2 4 8 16
#     SEEDS     1 2 3
#     CONFIG_so, CONFIG_lora, CONFIG_adam   configuration file of one method
#     RUNS      a file with main.py's arguments, a run a line, in place of all of the above
#     DATA      folder of the datasets (DATASETS.md)
#     PROCESSES processes of each run, started by torchrun
#     LOGS      folder of the logs (logs)
#     PYTHON    the interpreter (.venv's if there is one)
DATASETS=${DATASETS:-imagenet sun397 fgvc eurosat stanford_cars food101 oxford_pets oxford_flowers \
caltech101 dtd ucf101}
LOGS=${LOGS:-logs}
[ ! -x .venv/bin/python ] || PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python3}
root_path=()
[ -z "$DATA" ] || root_path=(--root_path "$DATA")

# Prints main.py's arguments for each run, a line each.
print_runs() {
    local method dataset datasets shot seed config
    [ -z "$RUNS" ] || { cat "$RUNS"; return; }
    if [ -e "$DATASETS" ]; then
        datasets=("$DATASETS") # one path, which may have blanks
    else
        # shellcheck disable=SC2162 # a backslash escapes a blank
        read -a datasets <<<"$DATASETS"
    fi
    for dataset in "${datasets[@]}"; do
        if [ -z "$DATA" ] && [ "$dataset" != digits ] && [[ $dataset != */* ]]; then
            echo "$0: set DATA to the folder of the datasets (DATASETS.md)" >&2
            return 2
        fi
        dataset=${dataset//\\/\\\\}
        dataset=${dataset// /\\ }
        for shot in ${SHOTS:-1 2 4 8 16}; do
            for seed in ${SEEDS:-1 2 3}; do
                for method in ${METHODS:-so lora adam}; do
                    config=CONFIG_$method
                    config=${!config:+--config ${!config} }
                    echo "$config--method $method --dataset $dataset --shots $shot --seed $seed"
                done
            done
        done
    done
}

# Sets `pending`, the runs that have no result yet. Arguments are those of all runs.
find_pending() {
    local lines run
    lines=$(print_runs) || exit
    lines=$("$PYTHON" scripts/list_pending.py "${root_path[@]}" "$@" <<<"$lines") || exit
    pending=()
    while IFS= read -r run; do
        [ -z "$run" ] || pending+=("$run")
    done <<<"$lines"
}

# Sets `command`, the command of run $1. The other arguments are those of all runs.
set_command() {
    local run
    # shellcheck disable=SC2162 # a backslash escapes a blank
    read -a run <<<"$1"
    command=("$PYTHON")
    [ -z "$PROCESSES" ] ||
        command+=(-m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" --)
    # Weights of hundreds of runs would fill a disk: they are saved only if an argument says so.
    command+=(main.py --resume --no-save_weights "${root_path[@]}" "${run[@]}" "${@:2}")
}

# Prints the name of run $1's log, which says which run it is.
log_of() {
    local name="$*"
    name=${name//--/}
    name=${name//[^a-zA-Z0-9.+-]/_}
    echo "$LOGS/${name:0:200}.txt" # file names may have 255 bytes
}

# Prints the last accuracy, error or message of SLURM since a log's last start, else its last line.
last_words() {
    tr '\r' '\n' <"$1" | awk '
        /^==> start/ { line = ""; found = 0 }
        /^==> / || !NF { next }
        /^\*\*\*\* Final |main\.py: |^slurmstepd[^:]*: / { line = $0; found = 1 }
        !found { line = $0 }
        END { print line }'
}
