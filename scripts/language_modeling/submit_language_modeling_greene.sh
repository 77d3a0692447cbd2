#!/usr/bin/env bash
# The language models of the paper's comparison as one SLURM array; scripts/submit.sh says what flags there are.
#   scripts/language_modeling/submit_language_modeling_greene.sh --dry-run
#   scripts/language_modeling/submit_language_modeling_greene.sh --account=A -- --only=d256 --seed=2
#SBATCH --job-name=language_modeling
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=24:00:00
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || exec bash scripts/array.sh "$1"
exec bash "$(dirname "$0")/../submit.sh" "$0" "$@"
