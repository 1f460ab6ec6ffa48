"""The subsets of launch/test.sh name files that there are."""

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_every_file_of_a_subset_exists():
    lists = "eval \"$(sed -n '/^QUICK=/,/^)/p; /^TEN=/,/^)/p' launch/test.sh)\""
    script = lists + """; printf '%s\\n' "${QUICK[@]}" -- "${TEN[@]}" """
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    names = result.stdout.split()
    quick, ten = names[: names.index("--")], names[names.index("--") + 1 :]
    assert len(quick) > 10 and len(ten) > 5
    missing = [name for name in quick + ten if not (ROOT / name).exists()]
    assert missing == []
