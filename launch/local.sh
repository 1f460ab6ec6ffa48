#!/usr/bin/env bash
# postrain on this machine: ./launch/local.sh train --config=configs/quickstart.py --workdir=runs/quickstart
# Makes .venv from the pinned lock the first time (Python 3.11 to 3.13 and pip are all that it needs).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare core.lock test.lock
exec "$VENV/bin/python" -m postrain.cli "$@"
