#!/usr/bin/env bash
#SBATCH --job-name=so
#SBATCH --array=0-494%16
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=logs/%A_%a.txt
# The sweep of sweep.sh as a job array, one run a task; submit it from the repository's folder:
#
#     mkdir -p logs
#     DATA=/path/to/data sbatch scripts/slurm_sweep.sh [arguments of main.py]
#     DATA=/path/to/data bash scripts/slurm_sweep.sh --dry-run [arguments of main.py]
#
# The dry run prints each task's command, and the --array that fits. Variables are those of runs.sh.
# 0-494 are the eleven datasets, five numbers of shots, three seeds, three methods; a task beyond
# the last run ends at once. Submit it again after a failure: finished runs are skipped. SLURM's
# preemption (SIGTERM) leaves a checkpoint, from which the task goes on when it is requeued.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
. scripts/runs.sh
list_runs

if [ "${1:-}" = --dry-run ]; then
    shift
    echo "# ${#runs[@]} tasks: sbatch --array=0-$((${#runs[@]} - 1)) scripts/slurm_sweep.sh"
    for number in "${!runs[@]}"; do
        read -ra arguments <<<"${runs[number]}"
        printf '%s:' "$number"
        arguments=("${first[@]}" ${common[@]+"${common[@]}"} "${arguments[@]}" "$@")
        printf ' %q' "$python" main.py "${arguments[@]}"
        echo
    done
    exit
fi
number=${SLURM_ARRAY_TASK_ID:?is set by SLURM: submit this script with sbatch, or give --dry-run}
if [ "$number" -ge ${#runs[@]} ]; then
    exit 0
fi
read -ra arguments <<<"${runs[number]}"
exec "$python" main.py "${first[@]}" ${common[@]+"${common[@]}"} "${arguments[@]}" "$@"
