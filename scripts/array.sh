#!/usr/bin/env bash
# One task of a SLURM array: runs line $SLURM_ARRAY_TASK_ID of a file of commands, from the repository's root.
#   python scripts/language_modeling/sweep.py > runs.txt
#   sbatch --array=1-$(wc -l < runs.txt) scripts/array.sh runs.txt
# Account, partition and time are yours to say: flags of sbatch, or SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT.
# Two minutes before the time is over the run is asked to save and stop; the same sbatch goes on from there.
#SBATCH --job-name=structured-attention
#SBATCH --gpus=1
#SBATCH --signal=B:USR1@120
set -euo pipefail
line=${SLURM_ARRAY_TASK_ID:?is set by sbatch --array}
command=$(sed -n "${line}p" "${1:?name the file of commands}")
[ -n "$command" ] || { echo "error: $1 has no line $line" >&2; exit 2; }
echo "$command"
eval "exec $command"
