#!/usr/bin/env bash
# The grid of in-context regression as one SLURM array; scripts/submit.sh says what flags there are.
#   scripts/icl_regression/submit_icl_regression.sh --dry-run
#   scripts/icl_regression/submit_icl_regression.sh --account=A -- --only='bilinear.*_n16_' --seed=2
#SBATCH --job-name=icl_regression
#SBATCH --cpus-per-task=2
#SBATCH --mem=16G
#SBATCH --time=24:00:00
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || exec bash scripts/array.sh "$1"
exec bash "$(dirname "$0")/../submit.sh" "$0" "$@"
