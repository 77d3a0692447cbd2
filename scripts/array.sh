#!/usr/bin/env bash
# One task of a SLURM array: runs line $SLURM_ARRAY_TASK_ID of a file of commands, from the repository's root.
# USR1, which comes before the time is over, and TERM, which comes at a preemption, are passed on: the run saves and ends
# with 128 + n. The task then goes back into the queue, unless SLURM is ending it (scancel), and goes on from there later.
set -euo pipefail
line=${SLURM_ARRAY_TASK_ID:?is set by sbatch --array}
command=$(sed -n "${line}p" "${1:?name the file of commands}")
[ -n "$command" ] || { echo "error: $1 has no line $line" >&2; exit 2; }
echo "$command"

run= interrupted=
pass_on() {
    interrupted=$1
    [ -z "$run" ] || kill -s "$1" "$run" 2>/dev/null || true
}
trap 'pass_on USR1' USR1 # before the run begins: a signal that finds no trap would end the task and leave the run
trap 'pass_on TERM' TERM
eval "exec $command" &
run=$!
[ -z "$interrupted" ] || pass_on "$interrupted"
interrupted=yes
while [ "$interrupted" ]; do # a trapped signal ends `wait`, not the run
    interrupted= status=0
    wait "$run" || status=$?
done

task=${SLURM_ARRAY_JOB_ID:-}_$line
case $status in
    138 | 143) # 128 + USR1, 128 + TERM
        if [ -n "$(squeue --noheader --jobs="$task" --states=RUNNING --format=%i)" ]; then
            echo "task $task stopped with status $status: back into the queue"
            scontrol requeue "$task"
        fi
        ;;
esac
exit "$status"
