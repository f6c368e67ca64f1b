#!/usr/bin/env bash
# Lists the runs of a sweep that have no result: the log of each, its last words, and its state in
# SLURM's queue. The status is 1 if there are any. Variables and arguments are those of the sweep:
# DATA=/path/to/data bash scripts/list_failed.sh [arguments of main.py]
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/sweep_common.sh

find_pending "$@"
queue=$(squeue --me --noheader --array --format='%F_%K %T' 2>/dev/null) || queue=
for run in "${pending[@]}"; do
    echo "$run"
    log=$(log_of "$run" "$@")
    if [ ! -e "$log" ]; then
        echo "    no log"
        continue
    fi
    task=$(readlink "$log") || task= # a log of slurm_sweep.sh is a link to ARRAY_TASK.txt
    state=$(awk -v task="${task%.txt}" '$1 != "" && $1 == task { print $2 ", " }' <<<"$queue")
    echo "    $state$log: $(last_words "$log")"
done
[ ${#pending[@]} -eq 0 ]
