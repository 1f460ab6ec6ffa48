#!/usr/bin/env bash
# Everything that CI checks: style, which part may import which, the tests. Arguments go to pytest:
# ./launch/test.sh tests/data -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare test.lock
cd "$ROOT"
export PATH="$VENV/bin:$PATH"
ruff check --quiet .
lint-imports --no-logo
# Two processes of tests, a file's tests in one of them; -n 0 for one process, in which a debugger works.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
