#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with no network: build, test, sanitise, measure.
#
#   benchmarks/gpu.sh OUT        writes logs and JSON into the folder OUT
#
# Needs python with torch for CUDA, nvcc, cmake, ninja, pybind11, pytest, pytest-benchmark and what the tests import.
# A step that fails is noted in OUT/summary.txt and the others still run; the exit status is the number of failed steps.
set -u
out=$(mkdir -p "${1:?expected a folder for the results}" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
export OMP_WAIT_POLICY=passive SINGE_CUDA=1
failed=0

step() { # step NAME COMMAND...: runs a command with its output in OUT/NAME.log
    local name=$1 start=$SECONDS status=0
    shift
    "$@" >"$out/$name.log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    echo "$name: exit $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

: >"$out/summary.txt"
step build python -m pip install --no-build-isolation --no-deps --no-index -e .
step info python -m singe.info
step tests python -m pytest -q tests/test_ops.py tests/test_devices.py
step sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 python -m pytest -q tests/test_ops.py -k "cuda and not opcheck"
step racecheck compute-sanitizer --tool racecheck --error-exitcode 9 python -m pytest -q tests/test_ops.py -k "cuda and sizes"
step operators python -m pytest -q benchmarks/test_ops.py -k cuda --benchmark-json="$out/operators.json"
step speed python benchmarks/speed.py --model resnet56 --device cuda --layers "blocks.*.conv1" --json "$out/speed.json"
exit "$failed"
