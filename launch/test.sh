#!/usr/bin/env bash
# Everything that CI checks: style, import layers, types, the tests.
#   ./launch/test.sh              all of it
#   ./launch/test.sh --quick      three minutes on two cores: what a change breaks most often
#   ./launch/test.sh --ten        ten minutes: that, and a run, checkpoints, kernels, folders
#   ./launch/test.sh tests/data -x    other arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare test.lock
cd "$ROOT"
export PATH="$VENV/bin:$PATH"

QUICK=(
    tests/config tests/objectives tests/golden tests/report tests/test_files.py tests/test_sharding.py
    tests/data/test_{messages,packing,kinds,rendering,mask_matrix,tokenizer}.py
    tests/models/test_{attention,transformer,heads,quantized,rope,flops}.py
    tests/rollout/test_sampling.py tests/training/test_{step,optimizer,spikes}.py
)
TEN=(
    tests/training tests/checkpoint tests/rollout tests/recipes/test_sft.py
    tests/models/test_{attention_kernels,moe,fp8,events}.py tests/hf/test_{hf_parity,hf_peft,folders}.py
    tests/data/test_{pipeline,streamed,formats,source}.py
)
case "${1:-}" in
    --quick) shift; set -- "${QUICK[@]}" "$@" ;;
    --ten) shift; set -- "${QUICK[@]}" "${TEN[@]}" "$@" ;;
esac

ruff check --quiet .
lint-imports --no-logo
mypy --no-error-summary
# Two processes of tests, a file's tests in one of them; -n 0 for one process, in which a debugger works.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
