#!/usr/bin/env bash
# All that needs a GPU, in one go and under eight minutes; downloads nothing: tests/bench/gpu.sh [--out FOLDER] [--tiny]
# --tiny needs no GPU: the same at small sizes on the CPU, the kernels in Triton's interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if command -v nvidia-smi > /dev/null; then nvidia-smi -L; fi
exec python -m tests.bench.gpu "$@"
