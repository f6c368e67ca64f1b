#!/usr/bin/env bash
# Lists the runs of a sweep that have no result, each with its log and the last words in it:
#
#     DATA=/path/to/data bash scripts/list_failed.sh [arguments of main.py]
#
# Variables (sweep_common.sh) and arguments are those of the sweep. Runs in SLURM's queue are listed with
# their state. The status is 1 if any run has no result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/sweep_common.sh

# Prints the last line in a log that is from main.py or SLURM itself; where there is none, the last
# line at all. Only the last start counts, and lines of the sweep's scripts ("==> ") do not.
last_words() {
    tr '\r' '\n' <"$1" | awk '
        /^==> start/ { said = ""; named = 0 }
        /^==> / || !NF { next }
        /main\.py: |^slurmstepd[^:]*: / { said = $0; named = 1 }
        !named { said = $0 }
        END { print said }'
}

list_runs
list_pending "$@"
queue=$(squeue --me --noheader --array --format='%F_%K %T' 2>/dev/null) || queue=
for number in ${left[@]+"${left[@]}"}; do
    echo "$number: ${runs[number]}"
    set_log "$number" "$@"
    if [ ! -e "$log" ]; then
        echo "    no log"
        continue
    fi
    file=$(readlink "$log") || file=
    state=$(awk -v job="${file%.txt}" '$1 == job { print $2 ", " }' <<<"$queue")
    echo "    $state$log: $(last_words "$log")"
done
[ ${#left[@]} -eq 0 ]
