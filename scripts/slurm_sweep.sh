#!/usr/bin/env bash
#SBATCH --job-name=so
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# The sweep of sweep.sh as a job array: one task for each run without a result (docs/clusters.md).
#
#     DATA=/path/to/data bash scripts/slurm_sweep.sh --dry-run [arguments of main.py]
#     DATA=/path/to/data bash scripts/slurm_sweep.sh [arguments of main.py]
#
# Submit again after failures: finished runs are left out. Variables: those of sweep_common.sh, and
#     SBATCH    more options of sbatch, which win: "--account=me --partition=gpu --time=4:00:00"
#     JOBS      tasks at a time (16)
#     RESTARTS  how often a task is requeued at its time limit (20)
set -eo pipefail
[ -n "$SLURM_ARRAY_TASK_ID" ] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/sweep_common.sh

submit() {
    local dry_run options list sbatch
    [ "$1" != --dry-run ] || { dry_run=yes && shift; }
    find_pending "$@"
    [ ${#pending[@]} -gt 0 ] || exit 0
    read -ra options <<<"$SBATCH"
    sbatch=(
        sbatch --export=ALL "--array=1-${#pending[@]}%${JOBS:-16}" "--chdir=$PWD"
        "--output=$LOGS/%A_%a.txt" "${options[@]}" "$PWD/scripts/slurm_sweep.sh" "$@"
    )
    if [ -n "$dry_run" ]; then
        printf '%q ' "${sbatch[@]}"
        printf '\n%s' "${pending[@]}" $'\n'
    else
        mkdir -p "$LOGS"
        list=$(mktemp "$LOGS/pending_XXXXXX")
        printf '%s\n' "${pending[@]}" >"$list"
        PENDING=$list "${sbatch[@]}"
    fi
}

# Makes the run in the task's line of PENDING.
run_task() {
    local run
    run=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$PENDING")
    [ -n "$run" ] || exit 0 # SBATCH's --array has more tasks than there are runs
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # a SLURM_JOB_ID may mean the whole array
    ln -sfn "$job.txt" "$(log_of "$run" "$@")"
    set_command "$run" "$@"
    echo "==> start $((SLURM_RESTART_COUNT + 1)) of job $job on $(hostname): ${command[*]}"
    trap 'echo "==> ended with status $?; scripts/list_failed.sh lists what has no result"' EXIT
    "${command[@]}" &
    child=$!
    trap 'stop requeue' USR1 # the time limit is near (--signal)
    trap stop INT TERM       # scancel, or preemption, after which SLURM itself requeues the task
    wait "$child"
}

# Stops the run and waits until it has written its checkpoint; `stop requeue` requeues the task.
stop() {
    local status
    trap '' INT TERM USR1
    kill "$child" 2>/dev/null || true
    wait "$child" && exit 0 || status=$?
    if [ "$1" = requeue ] && [ "$((SLURM_RESTART_COUNT))" -ge "${RESTARTS:-20}" ]; then
        echo "==> not requeued after $SLURM_RESTART_COUNT restarts (RESTARTS)"
    elif [ "$1" = requeue ]; then
        scontrol requeue "$job" || echo "==> not requeued: submit again to continue"
    fi
    exit "$status"
}

if [ -n "$SLURM_ARRAY_TASK_ID" ]; then
    run_task "$@"
else
    submit "$@"
fi
