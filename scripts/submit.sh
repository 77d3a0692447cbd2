#!/usr/bin/env bash
# Submit what is left of a grid as one SLURM array. The submit_*.sh beside the grids' sweep.py call it:
#   submit_NAME.sh [--dry-run] [flags of sbatch] [-- flags of sweep.py]
# Finished runs and runs in the queue are left out; a started run resumes. A task that is told to stop
# saves and goes back into the queue until its run is finished (array.sh). --dry-run shows everything and submits nothing.
#
# Resources are the #SBATCH lines of submit_NAME.sh; SBATCH_* variables (SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT,
# ...) replace them, flags replace both: --account=A --time=12:00:00, or --array=1-20%4 for four tasks at a time.
# A task gets one GPU where SLURM knows of any; --gres, --gpus, SBATCH_GRES or SBATCH_GPUS say otherwise (--gres=none).
# The Python environment is the one that is active here. Commands and logs go to a new folder in $LOG_DIR (out/slurm).
set -euo pipefail
script=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
grid=$(basename "$(dirname "$script")")

dry_run='' flags=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '1d; /^#/!q; s/^# \{0,1\}//p' scripts/submit.sh; exit ;;
        --dry-run) dry_run=yes ;;
        --) shift; break ;;
        *) flags+=("$1") ;;
    esac
    shift
done

runs=$(python "scripts/$grid/sweep.py" --todo=True "$@")
[ -n "$runs" ] || { echo "nothing to submit"; exit; }
folder=$(realpath -m "${LOG_DIR:-out/slurm}")/$grid-$(date +%Y%m%d-%H%M%S)-$$

# as variables, so that the user's own come first
export SBATCH_SIGNAL=${SBATCH_SIGNAL:-B:USR1@120} SBATCH_REQUEUE=${SBATCH_REQUEUE:-1}
export SBATCH_OPEN_MODE=${SBATCH_OPEN_MODE:-append} SBATCH_OUTPUT=${SBATCH_OUTPUT:-$folder/%a.out}
if [ -z "${SBATCH_GRES+given}${SBATCH_GPUS+given}" ] && [[ ! " ${flags[*]}" =~ \ (--gres|--gpus|-G) ]]; then
    gres=$(sinfo --noheader --format=%G 2>/dev/null || true)
    [[ $gres != *gpu* ]] || export SBATCH_GRES=gpu:1
fi
command=(sbatch "--array=1-$(wc -l <<<"$runs")" "--chdir=$PWD" "${flags[@]}" "$script" "$folder/runs.txt")

if [ "$dry_run" ]; then
    env | grep ^SBATCH_ | sort
    echo "${command[*]@Q}"
    echo "$runs"
else
    mkdir -p "$folder"
    echo "$runs" >"$folder/runs.txt"
    "${command[@]}"
    echo "commands and logs: $folder"
fi
