"""Models by their names on the Hugging Face hub: the real client, a server with the hub's routes, and its cache."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from hub_server import forget, point_at, serve_hub
from tiny_models import make_tiny_model

import postrain
from postrain.cli import main
from postrain.config import resolve
from postrain.errors import UserError
from postrain.hf.find_model import ModelFolder, find_model, locate_model
from postrain.hf.save import save_pretrained
from postrain.training.agreement import file_facts

NAME = "someone/tiny-model"
UNWANTED = {
    name: b"x" * 3000
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "tiny.gguf",
        "original/config.json",
    )
} | {"README.md": b"# tiny", ".gitattributes": b""}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder whose weights are in several files."""
    source = make_tiny_model(tmp_path_factory.mktemp("hub") / "whole", "qwen3")
    config, params = postrain.load_pretrained(source)
    folder = source.parent / "sharded"
    save_pretrained(folder, params, config, source_folder=source, max_shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch, model):
    with serve_hub() as server:
        point_at(monkeypatch, server.url, tmp_path / "cache")
        contents = {p.name: p.read_bytes() for p in model.iterdir()}
        server.repository(NAME).commit(contents | UNWANTED)
        monkeypatch.chdir(tmp_path)
        yield server
    forget()


def assert_same(found, expected):
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_a_model_by_its_name_is_that_of_its_folder(hub, model, capsys):
    folder = locate_model(NAME, weights=False)
    assert not list(folder.glob("*.safetensors")) and not any(
        "safetensors" in r for r in hub.fetched() if "index" not in r
    )
    assert_same(postrain.load_pretrained(NAME), postrain.load_pretrained(model))
    assert sorted(p.name for p in folder.rglob("*")) == sorted(p.name for p in model.iterdir())
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"fetching {len(list(model.glob('*.safetensors')))} files of weights of {NAME} at {folder.name} from the "
        "Hugging Face hub"
    )
    tokenizer = postrain.load_tokenizer(NAME)
    assert tokenizer.fingerprint() == postrain.load_tokenizer(model).fingerprint() and tokenizer.folder == folder
    hub.requests.clear()
    assert locate_model(NAME) == folder and not hub.requests
    forget()
    assert locate_model(NAME) == folder and hub.requests == [f"GET /api/models/{NAME}/revision/main"]


def test_revisions_and_a_branch_that_moves(hub, model):
    first = locate_model(NAME)
    raw = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 77}
    contents = {p.name: p.read_bytes() for p in model.iterdir()} | {"config.json": json.dumps(raw).encode()}
    second = hub.repository(NAME).commit(contents)
    assert locate_model(NAME) == first and locate_model(f"{NAME}@{second}").name == second
    hub.requests.clear()
    forget()
    assert locate_model(NAME).name == second and locate_model(f"{NAME}@{first.name}") == first
    assert not hub.fetched()  # but for config.json, nothing has another content
    assert postrain.load_pretrained(f"{NAME}@{second}")[0].max_positions == 77
    forget()
    assert file_facts(resolve({"model": {"path": NAME}, "data": {"train": "x"}})) == {
        f"{NAME} on the Hugging Face hub": f"commit {second}"
    }


def test_two_sets_of_weights_in_a_repository_are_those_of_a_folder(hub, model):
    """Fetched both, compared, and refused where they differ: no file of the repository is left out of the rule."""
    contents = {p.name: p.read_bytes() for p in model.iterdir()}
    whole = (model.parent / "whole" / "model.safetensors").read_bytes()
    hub.repository("someone/both").commit(contents | {"model.safetensors": whole})
    assert_same(postrain.load_pretrained("someone/both"), postrain.load_pretrained(model))
    hub.requests.clear()
    forget()
    assert (locate_model("someone/both") / "model.safetensors").exists() and not hub.fetched()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    hub.repository("someone/differ").commit(contents | {"model.safetensors": changed})
    with pytest.raises(UserError, match="holds two sets of weights that differ"):
        postrain.load_pretrained("someone/differ")
    left = {name: data for name, data in contents.items() if not name.endswith(".safetensors")}
    hub.repository("someone/stale").commit(left | {"model.safetensors": whole})
    assert_same(postrain.load_pretrained("someone/stale"), postrain.load_pretrained(model))


def test_a_repository_of_an_adapter_and_a_whole_model_is_refused_before_weights_are_fetched(hub, model):
    whole = (model.parent / "whole" / "model.safetensors").read_bytes()
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": NAME}).encode()
    both = {"adapter_config.json": adapter, "adapter_model.safetensors": b"x" * 3000, "model.safetensors": whole}
    hub.repository("someone/both").commit(both | {"config.json": (model / "config.json").read_bytes()})
    for weights in (False, True):
        for find in (find_model, locate_model):
            with pytest.raises(UserError, match=r"holds an adapter .* and a whole model .model.safetensors."):
                find("someone/both", weights=weights)
    assert hub.fetched() == {"adapter_config.json", "config.json"}


def test_a_folder_wins_over_a_name(hub, model, tmp_path):
    shutil.copytree(model, tmp_path / NAME)
    hub.requests.clear()
    assert str(locate_model(NAME)) == NAME and find_model(NAME).tokenizer.samefile(tmp_path / NAME)
    assert not hub.requests


def test_a_filled_cache_is_enough_without_a_network(hub, tmp_path, monkeypatch):
    folder = locate_model(NAME)
    for offline, url in ((True, hub.url), (False, f"http://127.0.0.1:{closed_port()}")):
        point_at(monkeypatch, url, tmp_path / "cache", offline=offline)
        hub.requests.clear()
        assert locate_model(NAME) == folder == locate_model(f"{NAME}@{folder.name}") and not hub.requests
    listings = list((tmp_path / "cache").rglob("trees/*.json"))
    for listing in listings:  # older versions of the client kept none
        listing.unlink()
    forget()
    assert listings and locate_model(NAME) == folder


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def no_safetensors(hub):
    hub.repository("someone/old").commit({"config.json": b"{}", "pytorch_model.bin": b"x"})


def gated(hub):
    hub.repository("someone/gated").commit({"config.json": b"{}"})
    hub.repository("someone/gated").gated = True


def private(hub):
    hub.repository("someone/private").commit({"config.json": b"{}"})
    hub.repository("someone/private").private = True


UNSEEN = "{url} shows no repository of that name: check the name; for a private repository, run `hf auth login` or set"
GATED = "{url} is gated: accept its terms on its page there, then run `hf auth login` or set HF_TOKEN"
REFUSALS = {
    "missing": ("someone/nothing", None, UNSEEN),
    "private": ("someone/private", private, UNSEEN),
    "gated": ("someone/gated", gated, GATED),
    "revision": (f"{NAME}@v9", None, "{url} has no such revision of it: give a branch, a tag or a commit"),
    "not a name": ("some--one/nothing", None, "expected OWNER/NAME or OWNER/NAME@REVISION"),
    "no safetensors": ("someone/old", no_safetensors, "has no model.safetensors: expected weights as safetensors"),
    "failing": (NAME, lambda hub: setattr(hub, "fail", 500), "500"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_fetched_is_one_line(hub, case, capsys, tmp_path):
    name, prepare, words = REFUSALS[case]
    if prepare:
        prepare(hub)
    with pytest.raises(UserError) as error:
        locate_model(name)
    message = str(error.value)
    assert message.startswith(name) and words.format(url=hub.url) in message and "\n" not in message
    if case in ("gated", "private"):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / "token").write_text(hub.token)
        assert (locate_model(name, weights=False) / "config.json").read_bytes() == b"{}"
    forget()
    code, config = 2, [f"--config.model.path={name}", "--config.data.train=t.jsonl"]
    commands = [["generate", f"--model={name}", "--prompt=hi"], ["verify", name]]
    commands.append(["train", f"--config={postrain.__path__[0]}/../configs/sft.py", "--workdir=run", *config])
    for command in [] if case in ("gated", "private") else commands:
        if case == "no safetensors" and command[0] == "train":
            continue
        assert main(command) == code, command
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    assert not (tmp_path / "run").exists()


def test_without_network_and_with_part_of_the_cache(hub, tmp_path, monkeypatch):
    def refusal(name, **options):
        with pytest.raises(UserError) as error:
            locate_model(name, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    dead = f"http://127.0.0.1:{closed_port()}"
    point_at(monkeypatch, dead, tmp_path / "cache")
    found = refusal(NAME)
    assert f"does not hold it, and the Hugging Face hub at {dead} cannot be reached (" in found
    point_at(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    offline = (
        f"{NAME} is not a folder here, and the cache {tmp_path}/cache does not hold it, and HF_HUB_OFFLINE is set: "
        "unset it, or first fetch it by `hf download`"
    )
    assert refusal(NAME) == offline
    point_at(monkeypatch, hub.url, tmp_path / "cache")
    locate_model(NAME, weights=False)
    point_at(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    assert locate_model(NAME, weights=False).is_dir()
    assert refusal(NAME) == offline
    (tmp_path / "file").write_text("in the way")
    point_at(monkeypatch, hub.url, tmp_path / "file")
    assert f"the cache {tmp_path}/file cannot be written (Not a directory): free some space, or set HF_HOME" in refusal(
        NAME
    )


def test_an_adapter_on_the_hub_and_its_base(hub, model, tmp_path):
    first = locate_model(NAME)
    rows = tmp_path / "t.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    values = {
        "model": {"path": f"{NAME}@{first.name}", "lora": {"rank": 2}},
        "data": {"train": str(rows), "sequence_length": 32, "batch_size": 4},
        "train": {"steps": 1},
        "export": {"format": "adapter"},
    }
    postrain.train(values, tmp_path / "run")
    export = tmp_path / "run" / "export"
    raw = json.loads((export / "adapter_config.json").read_text())
    assert (raw["base_model_name_or_path"], raw["revision"]) == (NAME, first.name)
    assert find_model(export) == ModelFolder(first, export, export)
    hub.repository(NAME).commit({"config.json": b"{}"})  # the base moves on: the adapter's revision stays
    hub.repository("someone/adapter").commit({p.name: p.read_bytes() for p in export.iterdir()})
    forget()
    shutil.rmtree(tmp_path / "cache")
    assert find_model("someone/adapter").base == first and (first / "model.safetensors.index.json").exists()
    assert postrain.generate("someone/adapter", "hi", max_new_tokens=8) == postrain.generate(
        export, "hi", max_new_tokens=8
    )
    assert main(["export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'merged'}", "--format=merged"]) == 0
    hub.requests.clear()
    assert main(["verify", "someone/adapter"]) == 0
    assert not hub.requests  # transformers and peft are given folders, and have nothing to say to the hub


def test_a_base_at_a_revision_that_is_gone_is_named_with_its_key(hub, tmp_path):
    """``revision`` of adapter_config.json is the base's, whatever the adapter's own was."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": NAME, "revision": "v9"}
    hub.repository("someone/adapter").commit({"adapter_config.json": json.dumps(adapter).encode()})
    first = hub.repository("someone/adapter").head()
    with pytest.raises(UserError) as error:
        find_model(f"someone/adapter@{first}", weights=False)
    named = f"base_model_name_or_path with revision is '{NAME}@v9', expected the adapter's base model: {NAME}@v9 is not"
    assert named in str(error.value) and "has no such revision of it" in str(error.value)


def test_commands_take_names(hub, tmp_path, capsys):
    rows, root = tmp_path / "t.jsonl", f"{postrain.__path__[0]}/.."
    rows.write_text('{"prompt": "a", "completion": "bb"}\n' * 8)
    config = [f"--config={root}/configs/sft.py", f"--config.model.path={NAME}", f"--config.data.train={rows}"]
    assert main(["preview", *config]) == 0 and "bb" in capsys.readouterr().out
    assert main(["verify", NAME, "--random", "--layers=1"]) == 0
    assert not [r for r in hub.fetched() if r.endswith(".safetensors")] and not list(tmp_path.rglob("*.safetensors"))
    assert main(["verify", NAME]) == 0
    capsys.readouterr()
    assert main(["generate", f"--model={NAME}", "--prompt=hi", "--max-new-tokens=4"]) == 0
    named = capsys.readouterr().out
    assert main(["generate", f"--model={locate_model(NAME)}", "--prompt=hi", "--max-new-tokens=4"]) == 0
    assert capsys.readouterr().out == named
    revisions = {r for r in hub.requests if "/revision/" in r}
    assert revisions == {f"GET /api/models/{NAME}/revision/main"}


FETCH = "from postrain.hf.find_model import locate_model; print(locate_model('someone/tiny-model'))"


def test_processes_that_begin_at_once_fetch_each_file_once(hub, tmp_path, model):
    """By the environment alone, as a user sets it."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FETCH]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in started}
    (folder,) = folders
    assert all(process.returncode == 0 for process in started)
    assert_same(postrain.load_pretrained(folder), postrain.load_pretrained(model))
    sent = [r for r in hub.requests if r.startswith("GET /lfs/")]
    assert len(sent) == len(set(sent)) > 2
    shutil.rmtree(tmp_path / "home")
    hub.requests.clear()
    root = f"{postrain.__path__[0]}/.."
    words = ["plan", f"--config={root}/configs/sft.py", "--target=cpu:1", f"--config.model.path={NAME}"]
    planned = subprocess.run([sys.executable, "-m", "postrain.cli", *words], env=environment, capture_output=True)
    assert planned.returncode in (0, 1) and b"fits" in planned.stdout, planned.stderr
    assert not [r for r in hub.requests if r.endswith(".safetensors")]
