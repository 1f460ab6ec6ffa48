"""The wheel holds the whole package, files that are not Python included."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_built_wheel_has_every_file_of_the_package(tmp_path):
    shutil.copytree(ROOT / "postrain", tmp_path / "postrain", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*"):
        if path.name == "pyproject.toml" or path.suffix == ".md" or path.name == "LICENSE":
            shutil.copy(path, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    result = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [wheel] = tmp_path.glob("*.whl")
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "postrain").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {"postrain/report/page.html.j2", "postrain/data/preview.html.j2"} < files
    with zipfile.ZipFile(wheel) as archive:
        assert files - set(archive.namelist()) == set()
