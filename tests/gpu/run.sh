#!/bin/sh
# Runs the tests of a GPU, then measures single layers and whole steps, in MINUTES (9.5) all in all: `make gpu`, or
#
#     sh tests/gpu/run.sh PYTHON RESULTS
#
# The tests get 4 of the minutes at most, the layers one; the steps have what is left. All leave what they have by then.
# Packages elsewhere: PYTHONPATH. ALIGNDET_GPU_TESTS_ON=cpu runs both on a CPU, the benchmark in a toy size.
set -u
python=${1:?the python to use}
results=${2:?a folder for the results}
began=$(date +%s)
cd "$(dirname "$0")/../.." || exit 2
mkdir -p "$results" || exit 2
export OMP_NUM_THREADS=1 ALIGNDET_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=cuda
[ "${ALIGNDET_GPU_TESTS_ON:-}" = cpu ] && device=cpu

# One look at all that is imported, before minutes are spent.
"$python" -c '
import importlib.util, sys
needed = "torch torchvision safetensors typer rich pydantic cv2 PIL pycocotools sklearn scipy joblib threadpoolctl numpy"
needed += " numba matplotlib jinja2 yaml click pytest xdist pytest_timeout"
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
sys.exit(f"{sys.executable} lacks {missing}: install them, or put their folder into PYTHONPATH" if missing else 0)
' || exit 2

# In several processes: one whose GPU is lost, or who dies, takes no other with him. SIGINT lets pytest tell what failed.
timeout -k 15 -s INT 240 "$python" -m pytest -m gpu tests/gpu -vv -n "${PROCESSES:-6}" --dist worksteal --tb=short \
    -W default --durations=10 -p no:cacheprovider --junitxml="$results/tests.xml" > "$results/tests.txt" 2>&1
tests=$?
tail -n 40 "$results/tests.txt"
[ $tests = 0 ] || echo "tests: exit code $tests; all of it is in $results/tests.txt"

# Some seconds, on a card only: in a toy size they tell nothing.
[ "$device" = cpu ] || timeout -k 5 60 "$python" tests/benchmarks/gpu_variants.py --output "$results"

# It ends by itself, and is ended where a call does not come back.
left=$(awk "BEGIN { left = int(${MINUTES:-9.5} * 60 - ($(date +%s) - $began) - 15); print (left > 5) ? left : 5 }")
minutes=$(awk "BEGIN { print $left / 60 }")
timeout -k 5 -s INT $((left + 10)) "$python" tests/benchmarks/gpu.py --device $device --minutes "$minutes" \
    --output "$results" || exit
exit $tests
