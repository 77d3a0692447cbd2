#!/usr/bin/env bash
# The time-series runs that want a GPU, with three seeds: patch transformers (27 runs), the paper's grid (54) and a small
# Chronos (6), standard beside MLR attention; then their records thinned for git, forecasts and tables.
#   bash scripts/time_series/gpu.sh [FOLDER]    FOLDER [results] gets time_series/, chronos/, ts_forecasts.json, ts_table.md
# ETT: a local ETTh1.csv; without it, it is downloaded. WORK: folder of the runs and their checkpoints, 6 GB
# [out/time_series_gpu]. LIMIT: seconds after which runs save and stop [540]. JOBS: runs at a time beside the six of
# Chronos [10]. SEEDS, EXTRA: other seeds, more flags for every run. PYTHON: the interpreter.
# A run that fails stops no other. The same command goes on: finished runs are left out, others resume.
set -uo pipefail
source "$(dirname "$0")/../usage.sh"
only_folder "$@"
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${1:-results}
work=${WORK:-out/time_series_gpu}
limit=${LIMIT:-540}
jobs=${JOBS:-10}
mkdir -p "$out" "$work"

if [ ! -e "$work/ett/ETTh1/meta.json" ]; then
    if [ -n "${ETT:-}" ]; then source=(--input "$ETT"); else source=(--names ETTh1); fi
    "$python" data/ett/prepare.py "${source[@]}" --out "$work/ett" || exit
fi

sweep=("$python" scripts/time_series/sweep.py --seeds="${SEEDS:-1|2|3}")
extra="--data_dir=$work/ett --log_interval=100"
chronos=(--grid=chronos --out_dir="$work/chronos" --extra="$extra ${EXTRA:-}")
patch=(--grid=patch --out_dir="$work/time_series" --extra="$extra --eval_batch_size=1024 ${EXTRA:-}")
# 200 iterations are the start of 1,000: read at step 200
paper=(--grid=paper --out_dir="$work/time_series" --extra="$extra --eval_batch_size=1024 --tf32=True ${EXTRA:-}" --only=_it1000_)

run() { # JOBS GRID: what is left of a grid, until the limit
    local seconds=$((limit - SECONDS)) jobs=$1
    shift
    [ $seconds -le 0 ] || timeout "$seconds" "${sweep[@]}" "$@" --run=True --jobs="$jobs"
}
run 6 "${chronos[@]}" &
run "$jobs" "${patch[@]}"
run "$jobs" "${paper[@]}"
wait
echo "runs ended after $SECONDS s"

status=0 made=()
for folder in time_series chronos; do
    "$python" scripts/collect.py "$work/$folder" "$out/$folder" --progress=20 || status=1
    compgen -G "$out/$folder/*/run.json" >/dev/null && made+=("$out/$folder")
done
"$python" plots/ts_table.py "${made[@]}" | tee "$out/ts_table.md" || status=1
first=${SEEDS:-1}
first=${first%%|*}
forecasts=$(printf "|$work/time_series/patch_%s_h192_seed$first" standard window mlr)
"$python" forecast_TS.py --out_dir="${forecasts#|}" --windows="0|800|1600|2400" --channel=OT \
    --out="$out/ts_forecasts.json" &&
    "$python" plots/ts_forecasts.py "$out/ts_forecasts.json" --out "$work/ts_forecasts.png" || status=1

left=$(for grid in chronos patch paper; do
    declare -n flags=$grid
    "${sweep[@]}" "${flags[@]}" --todo=True
done)
[ -z "$left" ] && exit $status
echo "not finished, and the last that each of them said:"
sed -n 's/.*--out_dir=\([^ ]*\).*/\1/p' <<<"$left" | while read -r run; do
    echo "$run: $(tail -n 1 "$run/output.txt" 2>/dev/null || echo "not started")"
done
exit 1
