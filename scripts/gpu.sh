#!/usr/bin/env bash
# What a change to the kernels has to pass on a GPU, then the tables that the README shows.
#   bash scripts/gpu.sh [FOLDER]     tables and logs go to results/bench, or to FOLDER; PYTHON chooses the interpreter
set -euo pipefail
case ${1:-} in
    -h | --help) sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit ;;
    -*) echo "error: no flag $1; the one argument is a folder" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-results/bench}
mkdir -p "$out"

"$python" -m pytest tests/test_kernels.py tests/test_engine.py tests/test_generate.py tests/test_prefetch.py
if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest tests/test_kernels.py -k "test_compiled and 53"
fi
"$python" bench.py attention --out="$out/attention.json" | tee "$out/attention.txt"
"$python" bench.py decode --out="$out/decode.json" | tee "$out/decode.txt"
"$python" bench.py icl --out="$out/icl.json" | tee "$out/icl.txt"
"$python" bench.py step --compile=True --out="$out/step.json" | tee "$out/step.txt"
"$python" plots/attention_speed.py "$out/attention.json" --out "$out/attention_speed.png"
