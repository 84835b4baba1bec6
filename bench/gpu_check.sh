#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build with CUDA, run the GPU tests, check memory accesses, time the kernels
# beside their peers and the measured ceilings; a table last. bench/gpu_check.sh [FOLDER for logs and gpu.json]
# Needs nvcc, and a python3 (PYTHON=...) that has torch with CUDA, triton, pytest, pybind11 and scikit-build-core.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA GPU" >&2; exit 1; }
step "build with LEPTON_CUDA=ON"
"$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --editable . \
  --config-settings=cmake.define.LEPTON_CUDA=ON --config-settings=build-dir=build/gpu-native
step "tests"
parallel=$("$python" -c 'import xdist; print("-n 8")' 2> /dev/null || true) # compiling kernels takes most of the time
"$python" -m pytest tests/gpu -m gpu -q $parallel 2>&1 | tee "$out/tests.log"
if command -v compute-sanitizer > /dev/null; then
  step "compute-sanitizer memcheck"
  compute-sanitizer --tool memcheck --error-exitcode 9 --log-file "$out/memcheck.log" \
    "$python" -m pytest tests/gpu -m gpu -q -k "quantize_rows or (gemm and 17-70) or 7-250 or 31-250 or 33-70 or graphs"
  tail -3 "$out/memcheck.log"
fi
step "benchmarks"
"$python" bench/gpu_bench.py --json "$out/gpu.json" 2>&1 | tee "$out/bench.log"
