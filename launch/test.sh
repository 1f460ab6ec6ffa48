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
exec python -m pytest "$@"
