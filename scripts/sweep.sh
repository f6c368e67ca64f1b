#!/usr/bin/env bash
# Datasets x shots x seeds x methods, one run of main.py each. Finished runs are skipped, failed
# ones are listed at the end. Stop it and start it again at any time: a run goes on from its
# checkpoint.
#
#     DATA=/path/to/data bash scripts/sweep.sh
#     DATA=/path/to/data DATASETS="eurosat dtd" SHOTS="1 4" SEEDS=1 METHODS="so lora" JOBS=2 \
#         bash scripts/sweep.sh --backbone ViT-B/32 --save_path results
#     DATASETS=digits SHOTS=4 bash scripts/sweep.sh
#
# The variables are those of sweep_common.sh, and
#     JOBS      runs at a time (1); with more, each run's output goes to a file below LOGS
#     GPUS      "0 1 2 3": one run at a time on each of these
# Arguments are passed on to main.py. Weights are kept with --save_weights alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
. scripts/sweep_common.sh
list_runs

read -ra gpus <<<"${GPUS:-}"
jobs=${JOBS:-1}
if [ ${#gpus[@]} -gt 0 ]; then
    jobs=${#gpus[@]}
fi
taken=$(mktemp -d) # a folder in it for each run that a worker has taken, and the list of failures
stop() {
    # The same signal may come again, as from SLURM or `timeout`, which signal every process of a
    # job: the runs are writing their checkpoints now, and are waited for.
    trap '' INT TERM
    trap - EXIT
    jobs -p | xargs kill 2>/dev/null
    wait
    rm -rf "$taken"
    echo "stopped; the same command goes on from here" >&2
    exit 130
}
trap stop INT TERM
trap 'rm -rf "$taken"' EXIT

list_pending "$@"
if [ ${#left[@]} -eq 0 ]; then
    exit
fi

worker() {
    local number log command child=
    trap 'trap "" TERM; kill "$child" 2>/dev/null; wait "$child"; exit 130' TERM
    for number in "${left[@]}"; do
        mkdir "$taken/$number" 2>/dev/null || continue # another worker has it
        set_command "$number" "$@"
        if [ "$jobs" -eq 1 ]; then
            echo "==> ${runs[number]}"
            "${command[@]}" &
        else
            set_log "$number" "$@"
            mkdir -p "${LOGS:-logs}"
            [ ! -L "$log" ] || rm "$log" # a link to the log of a SLURM task
            echo "==> start: ${command[*]}" >>"$log"
            "${command[@]}" >>"$log" 2>&1 &
        fi
        child=$!
        wait "$child" || echo "${runs[number]}" >>"$taken/failed"
        if [ "$jobs" -gt 1 ]; then
            echo "==> ${runs[number]}: $(awk '/^==> start/ { said = "" }
                /^\*\*\*\* Final [a-z]+ accuracy:|main\.py: / { said = $0 } END { print said }' "$log")"
        fi
    done
}

for ((slot = 0; slot < jobs; slot++)); do
    if [ ${#gpus[@]} -gt 0 ]; then
        export CUDA_VISIBLE_DEVICES=${gpus[slot]}
    fi
    worker "$@" &
done
wait
if [ -s "$taken/failed" ]; then
    echo "$(wc -l <"$taken/failed" | tr -d ' ') of ${#left[@]} runs failed:" >&2
    sed 's/^/    /' "$taken/failed" >&2
    exit 1
fi
