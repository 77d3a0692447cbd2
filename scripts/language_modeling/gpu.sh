#!/usr/bin/env bash
# The language-model runs behind results/lm_scaling.png on the GPUs of one machine: every structure at d_model 256 with two
# rates, the better one at 768, 512 and 384 and with another seed at all widths; fewer levels of MLR; a longer context.
# Then their records, thinned for git, and a table.
#   bash scripts/language_modeling/gpu.sh [FOLDER]     FOLDER [results] gets language_modeling/
# TRAIN, VAL: local texts for the corpus (.txt or .xz); without them OpenWebText is downloaded. DATA: folder of the prepared
# corpus [data]. WORK: folder of the runs and their checkpoints, 8 GB [out/language_modeling]. GPUS: how many to use [all].
# LIMIT: seconds after which runs save and stop [none]. STEPS [10000]. RATES [3e-3|1e-2]. COMPILE: how many shapes are
# compiled at a time [16]. EXTRA: more flags for every run. PYTHON: the interpreter. A run that fails stops no other. The
# same command goes on: finished runs are left out.
set -uo pipefail
source "$(dirname "$0")/../usage.sh"
only_folder "$@"
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${1:-results}
work=${WORK:-out/language_modeling}
data=${DATA:-data}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
steps=${STEPS:-10000}
jobs=$((gpus > 0 ? gpus : 1))
mkdir -p "$work"

if [ ! -e "$data/openwebtext_small/meta.json" ]; then
    # shellcheck disable=SC2086  several files each
    "$python" data/openwebtext_small/prepare.py ${TRAIN:+--input $TRAIN} ${VAL:+--val $VAL} --out "$data/openwebtext_small" || exit
fi

common="--data_dir=$data --gradient_accumulation_steps=1 --eval_iters=32"
schedule="--max_iters=$steps --warmup_iters=$((steps / 20)) --eval_interval=$((steps / 20)) --log_interval=$((steps / 40))"
run() { # JOBS FLAGS GRID..: what is left of a grid, until the limit; a GPU without a run takes the next
    local jobs=$1 flags=$2 left=$((${LIMIT:-1000000} - SECONDS))
    shift 2
    [ $left -le 0 ] || timeout "$left" "$python" scripts/language_modeling/sweep.py --out_dir="$work" --run=True \
        --jobs="$jobs" --spread="$gpus" --extra="$common $flags ${EXTRA:-}" "$@"
}
# two steps of every shape, many at a time: their kernels are compiled then, and no run waits for its own. The folder stays,
# so that the same command leaves them out.
run "${COMPILE:-16}" "--batch_size=32 --max_iters=2" --rates=1e-3 --grids="scaling|levels" --out_dir="$work.compiled"
run "${COMPILE:-16}" "--batch_size=8 --max_iters=2" --rates=1e-3 --grids=context --out_dir="$work.compiled"
run "$jobs" "--batch_size=32 $schedule" --seeds=1 --only=_d256_ --rates="${RATES:-3e-3|1e-2}"
run "$jobs" "--batch_size=32 $schedule" --seeds=1 --only="_d(768|512|384)_" --rates=best
run "$jobs" "--batch_size=8 $schedule" --seeds=1 --grids=context --rates=best
run "$jobs" "--batch_size=32 $schedule" --seeds=1 --grids=levels --rates=best
run "$jobs" "--batch_size=32 $schedule" --seeds=2 --rates=best
echo "runs ended after $SECONDS s"

"$python" scripts/collect.py "$work" "$out/language_modeling" && "$python" plots/lm_table.py "$out/language_modeling"
