#!/usr/bin/env bash
#SBATCH --job-name=so
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# The sweep of sweep.sh as a job array: a task for each run that is not finished (docs/clusters.md).
#
#     DATA=/path/to/data bash scripts/slurm_sweep.sh --dry-run [arguments of main.py]
#     DATA=/path/to/data bash scripts/slurm_sweep.sh [arguments of main.py]
#
# calls sbatch, from any folder; the dry run only prints its line and the command of each task.
# Submit again after failures: finished runs are left out. Variables are those of sweep_common.sh, and
#     SBATCH    more options of sbatch, which win: "--account=me --partition=gpu --time=4:00:00"
#     JOBS      tasks at a time (16)
#     RESTARTS  how often a task that meets its time limit is requeued (20)
# A task continues from its checkpoint after its time limit and preemption, and if submitted anew.
# Given to sbatch without --array, this file is one job that makes all runs through sweep.sh.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [ -e "$here/sweep_common.sh" ]; then
    cd "$here/.."
elif [ ! -e scripts/sweep_common.sh ]; then # SLURM runs a copy of this file where it was submitted
    echo "slurm_sweep.sh: $PWD is not the repository's folder: submit from there, or call" \
        "\`bash REPOSITORY/scripts/slurm_sweep.sh\`, which submits from any folder" >&2
    exit 2
fi
. scripts/sweep_common.sh

submit() {
    local dry_run='' largest offset number options tasks line
    if [ "${1:-}" = --dry-run ]; then
        dry_run=yes
        shift
    elif ! command -v sbatch >/dev/null; then
        echo "$0: there is no sbatch here; call it where jobs are submitted, or use --dry-run" >&2
        exit 2
    fi
    list_runs
    list_pending "$@"
    if [ -n "${DATA:-}" ] && [ ! -d "$DATA" ]; then
        echo "note: DATA=$DATA is not a folder here (seen from $PWD)" >&2
    fi
    mkdir -p "${LOGS:-logs}" # without it a task ends before it can say anything
    largest=$(scontrol show config 2>/dev/null | sed -n 's/^MaxArraySize *= *//p') || true
    largest=${largest:-1001} # SLURM's own default; numbers of tasks are below it
    read -ra options <<<"${SBATCH:-}"
    for ((offset = 0; offset < ${#runs[@]}; offset += largest)); do
        tasks=()
        for number in ${left[@]+"${left[@]}"}; do
            if [ "$number" -ge "$offset" ] && [ "$number" -lt $((offset + largest)) ]; then
                tasks+=($((number - offset)))
            fi
        done
        if [ ${#tasks[@]} -eq 0 ]; then
            continue
        fi
        line=(
            sbatch --export=ALL "--array=$(ranges "${tasks[@]}")%${JOBS:-16}" "--chdir=$PWD"
            "--output=${LOGS:-logs}/%A_%a.txt" ${options[@]+"${options[@]}"}
            "$PWD/scripts/slurm_sweep.sh" "$@"
        )
        if [ -z "$dry_run" ]; then
            OFFSET=$offset "${line[@]}"
            continue
        fi
        printf '# %s tasks: %sOFFSET=%s' ${#tasks[@]} "$(carried)" "$offset"
        printf ' %q' "${line[@]}"
        echo
        for number in "${tasks[@]}"; do
            set_command $((number + offset)) "$@"
            printf '%s:' $((number + offset))
            printf ' %q' "${command[@]}"
            echo
        done
    done
    if [ -z "$dry_run" ] && [ ${#left[@]} -gt 0 ]; then
        echo "Logs: $(cd "${LOGS:-logs}" && pwd). What has no result, and why:"
        echo "    $(failures "$@")"
    fi
}

# Prints numbers as --array takes them: 0 1 2 5 as 0-2,5.
ranges() {
    local number text='' first='' last=''
    for number in "$@" end; do
        if [ "$number" != "$((last + 1))" ] || [ -z "$last" ]; then
            if [ -n "$first" ]; then
                text+=",$first"
                [ "$first" = "$last" ] || text+="-$last"
            fi
            first=$number
        fi
        last=$number
    done
    echo "${text#,}"
}

# Prints the command that lists those runs of this sweep that have no result.
failures() {
    carried
    printf 'bash %q' "$PWD/scripts/list_failed.sh"
    [ $# -eq 0 ] || printf ' %q' "$@"
}

work() {
    local number last log own
    job=${SLURM_JOB_ID:-}
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        list_runs
        number=$((SLURM_ARRAY_TASK_ID + ${OFFSET:-0}))
        last=$((${#runs[@]} - 1))
        if [ "$number" -gt "$last" ]; then
            echo "==> there is no run $number: this sweep has runs 0 to $last"
            exit
        fi
        # Not SLURM_JOB_ID: one task's is the array's own number, which stands for all tasks.
        job=${SLURM_ARRAY_JOB_ID:-}_$SLURM_ARRAY_TASK_ID
        own=${LOGS:-logs}/$job.txt
        set_log "$number" "$@"
        if [ -e "$own" ]; then
            ln -sfn "${own##*/}" "$log"
        fi
        if [ "$number" -lt "$last" ] && [ "$SLURM_ARRAY_TASK_ID" = "${SLURM_ARRAY_TASK_MAX:-}" ]
        then
            echo "==> note: runs $((number + 1)) to $last are not in this array (they are" \
                "finished, in another one, or left out)"
        fi
        set_command "$number" "$@"
    else
        command=(bash scripts/sweep.sh "$@")
    fi
    echo "==> start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $job on $(hostname):$(
        printf ' %q' "${command[@]}"
    )"
    "${command[@]}" &
    child=$!
    trap 'stop requeue "$@"' USR1 # --signal's, when the time limit is near
    trap 'stop "" "$@"' INT TERM  # preemption, after which SLURM itself requeues, or scancel
    wait "$child" && status=0 || status=$?
    finish "$@"
}

# Stops the run, which writes its checkpoint, waits for it, and has SLURM start the job again.
stop() {
    local requeue=$1
    shift
    trap '' INT TERM USR1
    kill "$child" 2>/dev/null || true
    wait "$child" && status=0 || status=$?
    if [ -n "$requeue" ] && [ "$status" -ne 0 ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-20}" ]; then
            echo "==> not requeued, after ${SLURM_RESTART_COUNT} restarts (RESTARTS)"
        elif scontrol requeue "$job"; then
            echo "==> requeued, since the time limit is near"
        else
            echo "==> not requeued; submitted anew, it goes on from its checkpoint"
        fi
    fi
    finish "$@"
}

finish() {
    echo "==> ended with status $status. What has no result, and why: $(failures "$@")"
    exit "$status"
}

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || [ "${BASH_SOURCE[0]##*/}" = slurm_script ]; then
    work "$@"
else
    submit "$@"
fi
