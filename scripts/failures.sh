#!/usr/bin/env bash
# The runs of a sweep that have no result, each with its log and what that says last:
#
#     DATA=/path/to/data bash scripts/failures.sh [arguments of main.py]
#
# Variables and arguments are the sweep's (runs.sh). Runs that SLURM still has in its queue are
# listed with their state. The status is 1 where there are any.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/runs.sh

# Prints what a log says last of its run: main.py or SLURM where they said something, else its last
# line. Its bars, which write over themselves, and lines of our own are no such lines.
last_words() {
    tr '\r' '\n' <"$1" | awk '
        /^==> start/ { said = ""; named = 0 } # what an earlier attempt said is history
        /^==> / || !NF { next }
        /main\.py: |^slurmstepd[^:]*: / { said = $0; named = 1 }
        !named { said = $0 }
        END { print said }'
}

list_runs
list_unfinished "$@"
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
