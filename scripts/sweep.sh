#!/usr/bin/env bash
# Datasets x shots x seeds x methods, one run of main.py each. Finished runs are skipped, failed
# ones are listed at the end. Stop and start it at any time: runs continue from their checkpoints.
#
#     DATA=/path/to/data bash scripts/sweep.sh
#     DATA=/path/to/data DATASETS="eurosat dtd" SHOTS="1 4" SEEDS=1 METHODS="so lora" JOBS=2 \
#         bash scripts/sweep.sh --backbone ViT-B/32 --save_path results
#
# Variables are those of sweep_common.sh, and
#     JOBS      runs at a time (1); with more, the output of each run goes to a file in LOGS
#     GPUS      "0 1 2 3": one run at a time on each of these
# Arguments are passed on to main.py.
set -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
. scripts/sweep_common.sh

read -ra gpus <<<"$GPUS"
jobs=${JOBS:-1}
[ ${#gpus[@]} -eq 0 ] || jobs=${#gpus[@]}
taken=$(mktemp -d) # holds a folder for each run that a worker has taken, and the list of failures

# Stops the runs and waits until they have written their checkpoints, however often it is signaled.
stop() {
    trap '' INT TERM
    jobs -p | xargs kill 2>/dev/null
    wait
    echo "stopped; the same command continues from here" >&2
    exit 130
}
trap stop INT TERM
trap 'rm -rf "$taken"' EXIT

# Makes runs, one after the other, as long as there are any that no other worker has taken.
worker() {
    local run log command child=
    trap '' INT # Ctrl-C reaches all processes: stop ends the workers, and these end their runs
    trap 'trap "" TERM; kill "$child" 2>/dev/null; wait "$child"; exit 130' TERM
    for number in "${!pending[@]}"; do
        mkdir "$taken/$number" 2>/dev/null || continue
        run=${pending[number]}
        set_command "$run" "$@"
        if [ "$jobs" -eq 1 ]; then
            echo "==> $run"
            "${command[@]}" &
        else
            log=$(log_of "$run" "$@")
            [ ! -L "$log" ] || rm "$log" # a link to the log of a SLURM task
            echo "==> start: ${command[*]}" >>"$log"
            "${command[@]}" >>"$log" 2>&1 &
        fi
        child=$!
        wait "$child" || echo "$run" >>"$taken/failed"
        [ "$jobs" -eq 1 ] || echo "==> $run: $(last_words "$log")"
    done
}

find_pending "$@"
[ "$jobs" -eq 1 ] || mkdir -p "$LOGS"
for ((slot = 0; slot < jobs; slot++)); do
    [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[slot]}
    worker "$@" &
done
wait
if [ -s "$taken/failed" ]; then
    echo "$(wc -l <"$taken/failed" | tr -d ' ') of ${#pending[@]} runs failed:" >&2
    sed 's/^/    /' "$taken/failed" >&2
    exit 1
fi
