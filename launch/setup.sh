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
    local lock="$1" python
    if is_made "$@"; then return; fi
    python="$VENV/bin/python"
    fits "$python" || python="$(find_python)"
    # One command at a time: the others wait until file 9 is closed. Where the file system has no locks they do not.
    exec 9<"$ROOT/launch/setup.sh"
    "$python" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting for another command that makes .venv", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass'
    if ! is_made "$@"; then make_venv "$lock" "$python"; fi
    exec 9<&-
}

is_made() {
    local lock
    for lock in "$@"; do  # the first that .venv was made from will do
        if cmp -s "$ROOT/requirements/$lock" "$VENV/$lock"; then return; fi
    done
    return 1
}

make_venv() {
    local lock="$1" python="$2"
    echo "making .venv from requirements/$lock (once, some minutes)" >&2
    # One that was killed may have left a .venv without pip.
    if ! fits "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        fits "$python" && [ "$python" != "$VENV/bin/python" ] || python="$(find_python)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    rm -f "$VENV"/*.lock
    local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input)
    "${pip[@]}" -r "$ROOT/requirements/$lock"
    "${pip[@]}" --no-deps -e "$ROOT"
    cp "$ROOT/requirements/$lock" "$VENV/$lock"
}
