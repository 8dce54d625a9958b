#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with no network: build, test, sanitise, measure.
#
#   benchmarks/gpu.sh OUT        writes summary.txt, log.txt and JSON into the folder OUT, within ten minutes
#
# Needs torch for CUDA, nvcc, cmake, ninja, setuptools >= 77, numpy, tqdm and safetensors; pytest and hypothesis to test,
# pytest-benchmark for the operators, matplotlib for the plot. What is missing is noted, and so is a step that fails or
# runs over its time; the others still run. The exit status is the number of steps that did not succeed.
set -u
out=$(mkdir -p "${1:?expected a folder for the results}" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
command -v compute-sanitizer >/dev/null || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 SINGE_CUDA=1 PIP_BREAK_SYSTEM_PACKAGES=1
deadline=$((SECONDS + ${GPU_SECONDS:-570}))
scratch=$(mktemp)
failed=0
: >"$out/summary.txt"
: >"$out/log.txt"

note() {
    echo "$*" | tee -a "$out/summary.txt"
}

step() { # step NAME SECONDS COMMAND...: runs a command for so long at most and puts the end of its output into the log
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
    if [ "$limit" -gt 0 ]; then
        timeout --kill-after=5 "$limit" "$@" >"$scratch" 2>&1 || status=$?
    else
        status="skipped, no time left"
    fi
    { printf '\n=== %s: %s\n' "$name" "$*" && tail -c 2000000 "$scratch"; } >>"$out/log.txt"
    : >"$scratch"
    [ "$status" = 0 ] || failed=$((failed + 1))
    note "$name: exit $status, $((SECONDS - start)) s"
}

has() { # has MODULE...: whether Python can import all of them; notes those that it cannot
    local module status=0
    for module in "$@"; do
        "$python" -c "import $module" 2>/dev/null || { note "missing: $module" && status=1; }
    done
    return $status
}

sanitised() { # sanitised TOOL: the operators' tests on the GPU, with only our own kernels watched
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name kns=singe --print-limit 20 \
        --error-exitcode 9 "$python" -m pytest -q tests/test_ops.py -k "cuda and not opcheck"
}
export -f sanitised
export python

TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
export TORCH_CUDA_ARCH_LIST
note "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1), architecture $TORCH_CUDA_ARCH_LIST"

step build 240 "$python" -m pip install --no-build-isolation --no-deps --no-index -e .
step info 30 "$python" -m singe.info
step ceilings 40 "$python" benchmarks/ceilings.py --device cuda --json "$out/ceilings.json"
if has pytest hypothesis; then
    step tests 180 "$python" -m pytest -q tests -k "cuda and not resources" --continue-on-collection-errors
    step memcheck 90 bash -c "sanitised memcheck"
    step racecheck 60 bash -c "sanitised racecheck"
    has pytest_benchmark && step operators 60 "$python" -m pytest -q benchmarks/test_ops.py -k cuda \
        --benchmark-max-time=0.2 --benchmark-json="$out/operators.json"
fi
step speed 240 "$python" benchmarks/speed.py --device cuda --model resnet56 --rank-batches 1 --json "$out/speed.json"
step vgg16 90 "$python" benchmarks/speed.py --device cuda --model vgg16 --parts layers --neurons 4 --rounds 1 \
    --json "$out/speed_vgg16.json"
plot=()
has matplotlib && plot=(--plot "$out/growth.svg")
step growth 60 "$python" benchmarks/growth.py --device cuda --json "$out/growth.json" "${plot[@]}"
rm -f "$scratch"
exit "$failed"
