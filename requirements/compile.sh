#!/usr/bin/env bash
# Remakes the two locks from pyproject.toml (needs uv: pip install uv). One universal lock serves
# Python 3.11 to 3.13. torch's CUDA wheels are left out of the test lock: where a CPU build of torch
# is installed or offered, pip needs none of them, and elsewhere pip adds what its wheel asks for.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { uv pip compile pyproject.toml --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate -q "$@"; }
compile -o requirements/core.lock
cuda=()
for p in bindings pathfinder toolkit; do cuda+=(--no-emit-package "cuda-$p"); done
for p in cublas cuda-cccl cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse \
         cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx; do cuda+=(--no-emit-package "nvidia-$p"); done
compile --extra test -c requirements/core.lock -c <(echo "torch==2.13.0") --no-emit-package triton "${cuda[@]}" -o requirements/test.lock
