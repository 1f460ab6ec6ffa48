#!/usr/bin/env bash
# postrain on this machine: ./launch/local.sh train --config=configs/quickstart.py --workdir=runs/quickstart
# Makes .venv from the pinned lock the first time (Python 3.11 to 3.13 and pip are all that it needs).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare core.lock test.lock
# A step on CPU takes its memory anew each time; in pages of 4 KiB that is a fifth of its time. glibc 2.35 and later.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "$VENV/bin/python" -m postrain.cli "$@"
