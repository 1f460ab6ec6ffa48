"""The README and the guides are true: their commands run, their keys, links and names exist."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import typing

import pytest
from tiny_models import make_tiny_model

from postrain import arguments, cli
from postrain.config import Config
from postrain.config.load import load_config
from postrain.rollout.constraints import json_schema

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_commands(page):
    """The shell commands of a page that run postrain, as lists of words, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] in ("postrain", "./launch/local.sh")]


def in_small(words, folder):
    """A command of the README on a tiny model and few rows, written to ``folder``."""
    changed = []
    for word in words:
        word = word.replace("MODEL_DIR", str(folder / "model")).replace("runs/", f"{folder}/runs/")
        word = re.sub(r"(train|held_out)\.jsonl", rf"{folder}/\1.jsonl", word)
        word = word.replace("configs/quickstart.py", "configs/quickstart.py:small")
        changed.append(word)
    if "train" in changed:
        changed += ["--config.train.steps=2", "--config.data.sequence_length=512"]
        changed += [f"--config.model.path={folder}/model"]
    return changed


def run(words):
    command = [sys.executable, "-m", "postrain.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    make_tiny_model(folder / "model", "llama", vocab_size=301, max_position_embeddings=1024)
    rows = (ROOT / "configs/data/quickstart_train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:8]))
    (folder / "held_out.jsonl").write_text("".join(rows[8:12]))
    return folder


def test_the_first_screen_has_the_two_commands():
    top = (ROOT / "README.md").read_text().splitlines()[:30]
    assert "./launch/local.sh train --config=configs/quickstart.py --workdir=runs/quickstart" in top
    assert "./launch/test.sh" in top


def test_the_commands_of_the_readme_run(folder):
    commands = read_commands(ROOT / "README.md")
    assert [words[0] for words in commands] == ["train", "preview", "train"]
    for words in commands:
        result = run(in_small(words, folder))
        assert result.returncode == 0, (words, result.stderr)
    for name in ("quickstart", "mine"):
        assert (folder / "runs" / name / "report.html").exists()
        assert (folder / "runs" / name / "export" / "model.safetensors").exists()


def test_the_commands_of_the_page_on_preferences_run(folder):
    rows = [
        {"prompt": f"{i} is", "chosen": "even" if i % 2 else "odd", "rejected": "neither of the two"} for i in range(6)
    ]
    for name in ("pairs", "held_out_pairs"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in rows
        for kind in ("chosen", "rejected")
    ]
    for name in ("answers", "held_out_answers"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    commands = read_commands(ROOT / "docs" / "preference.md")
    for name, words in zip(("dpo", "kto"), commands, strict=True):
        words = [re.sub(r"(held_out_)?(pairs|answers)\.jsonl", rf"{folder}/\g<0>", word) for word in words]
        result = run(in_small(words, folder))
        assert result.returncode == 0, result.stderr
        assert (folder / "runs" / name / "export" / "model.safetensors").exists()


def test_the_commands_of_the_page_on_reward_models_run(folder):
    """From pairs to scores, and answers of a model to the best of each prompt."""
    rows = [{"prompt": f"{i} is", "chosen": "even" if i % 2 else "odd", "rejected": "neither"} for i in range(6)]
    for name in ("pairs", "held_out_pairs"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i // 2} is"}) + "\n" for i in range(6)))
    page = ROOT / "docs" / "reward.md"
    for words in read_commands(page):
        words = [re.sub(r"(held_out_)?(pairs|prompts)\.jsonl", rf"{folder}/\g<0>", word) for word in words]
        words += ["--max-new-tokens=4"] if words[0] == "generate" else []
        result = run(in_small(words, folder))
        assert result.returncode == 0, (words, result.stderr)
    [scored] = [(folder / "runs" / "scored.jsonl").read_text().splitlines()]
    assert [json.loads(line)["prompt"] for line in scored] == [f"{i // 2} is" for i in range(6)]
    rows = [json.loads(line) for line in scored]
    for i, row in enumerate(rows):  # such short answers of a random model do not end
        row["generated"] = {"text": f"answer {i}", "finished": True}
        row["score"] = float(i % 3)
    (folder / "runs" / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [script] = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder)
    best = [json.loads(line)["messages"] for line in (folder / "runs" / "best.jsonl").read_text().splitlines()]
    assert [(one[0]["content"], one[1]["content"]) for one in best] == [
        (f"{i} is", f"answer {j}") for i, j in ((0, 1), (1, 2), (2, 5))
    ]


def test_the_commands_of_the_page_on_distillation_run(folder, capfd):
    make_tiny_model(folder / "teacher", "qwen3", vocab_size=330)
    for words in read_commands(ROOT / "docs" / "distill.md"):
        words = [re.sub("STUDENT_DIR|TEACHER_DIR", str(folder / "teacher"), word) for word in words]
        words = [re.sub("=teacher_rows$", f"={folder}/teacher_rows", word) for word in in_small(words, folder)]
        words = [word.replace("--config=", f"--config={ROOT}/") for word in words]
        assert cli.main(words) == 0, capfd.readouterr().err
    assert (folder / "runs" / "distill" / "export" / "model.safetensors").exists()


def test_the_commands_of_the_page_on_logged_answers_run(folder):
    """The training, and the evaluation of the model that it made; the other variants of the config can be read."""
    messages = [json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()]
    logged = [{"messages": one, "reward": i % 3, "member": i % 2, "propensity": 0.5} for i, one in enumerate(messages)]
    for name in ("logged", "decisions"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    train, evaluate = read_commands(ROOT / "docs" / "weighted_sft.md")
    train = [re.sub(r"logged\.jsonl", rf"{folder}/\g<0>", word) for word in train]
    result = run(in_small(train, folder))
    assert result.returncode == 0 and "effective sample size" in result.stdout, result.stderr
    words = {"model.path": "m", "data.train": "logged.jsonl"}
    for variant, baseline in (("advantage", "member"), ("head", "head")):
        other = load_config(f"{ROOT}/configs/weighted_sft.py:{variant}", words).sft.weights
        assert (other.mode, other.baseline) == ("advantage", baseline)
    words = [word.replace("MODEL_DIR", f"{folder}/runs/weighted/export") for word in evaluate]
    result = run([word.replace("decisions.jsonl", f"{folder}/decisions.jsonl") for word in words])
    assert result.returncode == 0 and "snips" in result.stdout, result.stderr


def test_the_programs_of_the_page_on_constraints_run(folder):
    page = (ROOT / "docs" / "constraints.md").read_text()
    constrain, rank = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    outputs = []
    for script in (constrain, rank):
        script = script.replace("MODEL_DIR", str(folder / "model"))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    found = json.loads(outputs[0])
    assert found["year"] >= 1900 and len(found["title"]) <= 20 and len(found) == 2
    lines = [line.split(maxsplit=1) for line in outputs[1].splitlines()]
    assert sorted(item for _, item in lines) == ["Alien (1979)", "Aliens (1986)", "Stalker (1979)"]
    assert [float(score) for score, _ in lines] == sorted((float(score) for score, _ in lines), reverse=True)
    [listed] = re.findall(r"^Keywords of a schema: (.*?);", page, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", listed)) == json_schema.KEYWORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page, folder):
    for words in read_commands(page):
        # The recipe that adding_an_objective.md makes; tests/test_adding_an_objective.py runs that command.
        unknown = ("...", "--config.KEY=VALUE", "--config.recipe=document_sft")
        words = [word for word in words if word not in unknown]
        rest, overrides = arguments.split_overrides(words)
        args = arguments.make_parser().parse_args(rest)
        if hasattr(args, "config"):
            needed = {"model.path": "m", "data.train": "t.jsonl"}
            load_config(str(ROOT / args.config), needed | overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_and_link_exists(page):
    text = page.read_text(encoding="utf-8")
    sections = {field.name for field in dataclasses.fields(Config)}
    for section, path in re.findall(r"`(\w+)\.([a-z_.]+)\b", text):
        if section in sections and path not in ("py", "jsonl", "json"):
            kind = typing.get_type_hints(Config)[section]
            for part in path.split("."):
                assert part in typing.get_type_hints(kind), f"{page.name}: {section}.{path}"
                kind = typing.get_type_hints(kind)[part]
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_lists_every_command():
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    [commands] = [action for action in arguments.make_parser()._actions if getattr(action, "choices", None)]
    assert listed == list(commands.choices)


def test_the_scripts_find_a_python_and_start_at_once(tmp_path):
    """A .venv made from the lock is used as it is; another lock is noticed."""
    for name in ("launch", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements" / "test.lock", tmp_path / ".venv" / "test.lock")
    script = tmp_path / "launch" / "local.sh"
    result = subprocess.run([script, "train", "a b"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "-m postrain.cli train a b\n")
    (tmp_path / "requirements" / "test.lock").write_text("other\n")
    environment = {**os.environ, "PYTHON": "/nowhere/python"}
    (tmp_path / ".venv" / "bin" / "python").unlink()
    result = subprocess.run([script, "train"], capture_output=True, text=True, env=environment)
    assert result.returncode != 0
    assert "error: expected Python 3.11, 3.12 or 3.13, found none in PYTHON=/nowhere/python" in result.stderr


def test_two_first_commands_make_one_venv(tmp_path):
    """The second waits for the first, and finds what it has made."""
    for name in ("launch", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in
    "-m venv "*) echo venv >> {tmp_path}/log; mkdir -p "$3/bin"; cp {python} "$3/bin/python"; sleep 1 ;;
    "-m pip --version") ;;
    "-m pip "*) echo pip >> {tmp_path}/log; sleep 0.1 ;;
    "-m postrain.cli "*) echo "$@" ;;
    *) exec {sys.executable} "$@" ;;
esac
""")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    command = [tmp_path / "launch" / "local.sh", "train"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen(command, **options) for _ in range(3)]
    ended = [(*process.communicate(timeout=30), process.returncode) for process in started]
    assert [(out, code) for out, _, code in ended] == [("-m postrain.cli train\n", 0)] * 3, ended
    assert (tmp_path / "log").read_text().split() == ["venv", "pip", "pip"]
    assert sum("making .venv" in error for _, error, _ in ended) == 1
    assert any("waiting for another command that makes .venv" in error for _, error, _ in ended)
