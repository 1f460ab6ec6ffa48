# Sourced by local.sh and test.sh: `prepare LOCK` makes .venv from requirements/LOCK the first time, and
# returns at once when .venv was made from this very lock. PYTHON=/path/to/python chooses another Python.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

fits() {
    command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: expected Python 3.11, 3.12 or 3.13, found none${PYTHON:+ in PYTHON=$PYTHON}; install one or set PYTHON" >&2
    return 1
}

prepare() {
    local lock python
    for lock in "$@"; do  # the first that .venv was made from will do
        if cmp -s "$ROOT/requirements/$lock" "$VENV/$lock"; then return; fi
    done
    lock="$1"
    echo "making .venv from requirements/$lock (once, some minutes)" >&2
    if ! fits "$VENV/bin/python"; then
        python="$(find_python)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    rm -f "$VENV"/*.lock
    local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input)
    "${pip[@]}" -r "$ROOT/requirements/$lock"
    "${pip[@]}" --no-deps -e "$ROOT"
    cp "$ROOT/requirements/$lock" "$VENV/$lock"
}
