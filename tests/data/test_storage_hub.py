"""hf:// by the real client, from a server that answers as the hub's own does for a data set."""

import hashlib
import os
import subprocess
import sys

import fsspec
import huggingface_hub
import pytest
from hub_server import forget, point_at, serve_hub
from huggingface_hub import HfFileSystem
from tiny_models import make_tiny_model

from postrain.data.files import storage
from postrain.data.files.formats import list_blocks, read_block
from postrain.data.files.storage import StorageOptions, StoredFile, list_files
from postrain.errors import UserError

QUICK = StorageOptions(tries=3, timeout=20.0, first_wait=0.01)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
        point_at(monkeypatch, server.url, tmp_path / "cache")
        monkeypatch.setattr(storage, "PIECE", 30_000)
        yield server
        HfFileSystem.clear_instance_cache()
    forget()


def lines_of(letter):
    return b"".join(b'{"text": "%s%d"}\n' % (letter, i) for i in range(4000))


def texts(blocks):
    return [raw["text"] for block in blocks for _, raw in read_block(block, "s", QUICK)]


def test_a_data_set_of_the_hub_is_read_at_one_commit(hub):
    data = hub.repository("o/d", "datasets")
    data.commit({"README.md": b"1", "a.jsonl": lines_of(b"a"), "b.jsonl": lines_of(b"b")})
    files = list_files("hf://datasets/o/d", QUICK)
    version = hashlib.sha1(lines_of(b"a")).hexdigest()
    assert files[0] == StoredFile("hf://datasets/o/d/a.jsonl", len(lines_of(b"a")), version)
    assert files == list_files("hf://datasets/o/d/*.jsonl", QUICK)
    blocks = list_blocks(files, 10_000, QUICK)
    rows = [f"{letter}{i}" for letter in "ab" for i in range(4000)]
    hub.faults[:] = [None, 503]
    assert texts(blocks) == rows and not hub.faults
    hub.requests.clear()
    first = data.head()
    data.commit({"README.md": b"2", "a.jsonl": lines_of(b"A"), "b.jsonl": lines_of(b"b")})
    assert texts(blocks) == rows and not [r for r in hub.requests if "/api/" in r]  # no question again for each block
    forget()  # as another process begins
    with pytest.raises(UserError, match=f"a.jsonl has changed since it was listed .* version {version}; now"):
        texts(blocks[:1])
    assert texts(b for b in blocks if b.file == files[1]) == rows[4000:]
    assert texts(list_blocks(list_files(f"hf://datasets/o/d@{first}/a.jsonl", QUICK), 10_000, QUICK)) == rows[:4000]


def test_what_is_not_on_the_hub_is_named(hub, tmp_path):
    hub.repository("o/d", "datasets").commit({"a.jsonl": b"{}\n"})
    hub.repository("o/gated", "datasets").commit({"a.jsonl": b'{"text": "x"}\n' * 9})
    hub.repository("o/gated", "datasets").gated = True
    for url, reason in {
        "hf://datasets/o/d/b.jsonl": " matches no file",
        "hf://datasets/o/nothing/a.jsonl": f" cannot be read: the Hugging Face hub at {hub.url} shows no repository of",
        "hf://datasets/o/nothing": f" cannot be read: the Hugging Face hub at {hub.url} shows no repository of that na",
        "hf://datasets/o/d@v2/a.jsonl": f" cannot be read: the Hugging Face hub at {hub.url} has no such revision of",
    }.items():
        with pytest.raises(UserError) as error:
            list_files(url, QUICK)
        assert str(error.value).startswith(url + reason) and "\n" not in str(error.value)
    (file,) = list_files("hf://datasets/o/gated", QUICK)
    with pytest.raises(UserError, match="a.jsonl@0 cannot be read: its repository .* is gated: accept its terms on"):
        texts(list_blocks([file], 10_000, QUICK))
    HfFileSystem.clear_instance_cache()
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "token").write_text(hub.token)
    assert texts(list_blocks([file], 10_000, QUICK)) == ["x"] * 9


def test_without_access_to_the_hub_its_cache_is_read(hub, tmp_path, monkeypatch):
    files = {f"part/{i}.jsonl": lines_of(b"%d" % i) for i in range(3)} | {"README.md": b"1"}
    commit = hub.repository("o/d", "datasets").commit(files)
    huggingface_hub.snapshot_download("o/d", repo_type="dataset", allow_patterns=["part/0*", "part/1*"])
    point_at(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    hub.requests.clear()
    folder = tmp_path / "cache" / "datasets--o--d" / "snapshots" / commit
    rows = [f"{letter}{i}" for letter in "01" for i in range(4000)]
    for url in ("hf://datasets/o/d/part/{0,1}.jsonl", f"hf://datasets/o/d@{commit}/part/[01].jsonl"):
        found = list_files(url, QUICK)
        assert [f.url for f in found] == [str(folder / f"part/{i}.jsonl") for i in (0, 1)]
        assert texts(list_blocks(found, 10_000, QUICK)) == rows
    away = f"the cache {tmp_path}/cache does not hold it, and HF_HUB_OFFLINE is set: unset it, or first fetch it by"
    for url in (
        "datasets/o/d",
        "datasets/o/d/part",
        "datasets/o/d/part/*",
        "datasets/o/d@v2",
        "datasets/o/other/a.jsonl",
    ):
        with pytest.raises(UserError) as error:
            list_files(f"hf://{url}", QUICK)
        assert str(error.value).startswith(f"hf://{url} cannot be read: {away}")
    with pytest.raises(UserError, match="part/7.jsonl matches no file"):
        list_files("hf://datasets/o/d/part/7.jsonl", QUICK)
    assert not hub.requests


@pytest.mark.parametrize("nowhere", ["http://hub.invalid", "http://127.0.0.1:9"])  # no such name, nobody there
def test_a_machine_without_a_network_is_told_so_in_seconds(hub, monkeypatch, nowhere):
    """A storage that was reached before is waited for as ever (test_storage_remote)."""
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": nowhere})
    HfFileSystem.clear_instance_cache()
    with pytest.raises(UserError) as error:
        list_files("hf://datasets/o/d/a.jsonl", StorageOptions(tries=50, first_wait=0.01))
    assert str(error.value).startswith("hf://datasets/o/d/a.jsonl cannot be read: 3 tries within ")
    assert str(error.value).endswith("fetch it by `hf download` where there is one and set HF_HUB_OFFLINE")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_command_line_reads_from_the_hub(hub, tmp_path, streaming):
    """In a process of its own, as the client decides when it is loaded whether it may ask the hub at all."""
    hub.repository("o/d", "datasets").commit({"a.jsonl": b'{"text": "out of the hub"}\n' * 8})
    model = make_tiny_model(tmp_path / "model", "llama", vocab_size=301)
    url, config = "hf://datasets/o/d/a.jsonl", tmp_path / "c.py"
    values = {"model": {"path": str(model)}, "data": {"train": url, "streaming": streaming}, "train": {"steps": 1}}
    config.write_text(f"def get_config(arg=None):\n    return {values!r}\n")
    command = [sys.executable, "-m", "postrain.cli", "preview", f"--config={config}"]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 0 and "of the hub<|im_end|>" in result.stdout, result.stderr
    environment["HF_HUB_OFFLINE"] = "1"
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: config key 'data.train': {url} cannot be read: the cache {tmp_path}/home/hub does not hold it, and "
        "HF_HUB_OFFLINE is set: unset it, or first fetch it by `hf download`\n"
    )
