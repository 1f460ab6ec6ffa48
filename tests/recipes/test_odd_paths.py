"""Workdir, data, model and output in folders of odd names: a run there works to its end, or is refused in one line."""

import errno
import fcntl
import os
import pathlib
import shutil
import unicodedata

import pytest
from sft_runs import make_values, read_lines

from postrain import UserError, arguments, load_pretrained, train
from postrain.checkpoint.checkpointer import Checkpointer
from postrain.config import CheckpointConfig, resolve
from postrain.config.load import PATHS
from postrain.export import export_workdir

LETTER = "e\u0301"
SINGLE = {
    "blanks": " a  b ",
    "NFC": unicodedata.normalize("NFC", LETTER),
    "NFD": unicodedata.normalize("NFD", LETTER),
    "hash": "a#b",
    "colon": "a:b",
    "per cent": "a%20b",
    "braces": "{a,b}",
    "quotes": "'a' \"b\"",
    "newline": "a\nb",
    "dash": "-rf",
    "tilde": "~",
    "dollar": "$HOME",
    "long": "n" * 200,
}
TOGETHER = "- #:%20 'a' \" \n $HOME ~ " + SINGLE["NFC"] + SINGLE["NFD"]
PATTERNS = {"brackets": "[x]", "star": "a*b", "question mark": "a?b", "backslash": "a\\b", "escape": "\x1b[1m"}


def run_in(folder, inputs, workdir):
    """Two steps, in two runs of which the second goes on, with model and data in ``folder``; and an export there."""
    for name in ("model", "train.jsonl", "eval.jsonl"):
        copy = shutil.copytree if (inputs / name).is_dir() else shutil.copy
        copy(inputs / name, folder / name)
    for steps in (1, 2):
        values = make_values(
            folder,
            train={"steps": steps},
            optimizer={"schedule": "constant"},
            eval={"every": 0, "before": False, "generate_rows": 0},
            export={"format": "none"},
        )
        train(values, workdir)
    workdir = pathlib.Path(workdir).expanduser()
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == [1, 2]
    export_workdir(workdir, folder / "out", format="merged")
    assert load_pretrained(folder / "out")[0].num_layers == 3


def test_odd_names_on_a_mount_without_locks_and_with_a_home_that_is_not_there(inputs, tmp_path, monkeypatch, capsys):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path(TOGETHER)
    folder.mkdir()
    run_in(folder, inputs, folder / "run")
    assert "its file system has no locks" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [TOGETHER]


def test_a_link_to_a_folder_whose_name_is_a_pattern(inputs, tmp_path, monkeypatch):
    """Model, data and output may have such names, and ~ is the home in all of them."""
    folder = tmp_path / "".join(PATTERNS.values())
    (folder / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    run_in(folder, inputs, "~/link")
    assert (folder / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_each_name_alone(inputs, tmp_path, name):
    folder = tmp_path / SINGLE[name]
    folder.mkdir()
    run_in(folder, inputs, folder / "run")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *(
            (name, "in its path cannot be read again: choose another name, or give a link")
            for name in PATTERNS.values()
        ),
        (os.fsdecode(b"a\xff"), "a\\udcff': expected a path in UTF-8, and a locale that has its characters"),
        ("n" * 300, "cannot be written (File name too long): choose another place"),
        (("n" * 200 + "/") * 18, "bytes: expected at most 3,584, as the files of checkpoints have longer ones"),
    ],
)
def test_a_workdir_that_cannot_work_is_refused_before_anything_is_written(inputs, tmp_path, name, words):
    (tmp_path / "axb" / "checkpoints").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for place in (tmp_path / "run" / name, tmp_path / name):
        with pytest.raises(UserError) as refused:
            train(make_values(inputs), place)
        assert words in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mount_that_cannot_rename_folders_is_refused(inputs, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EMFILE, "Too many open files", source)  # as gcsfuse has it

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot be made and renamed there \(Too many open files\), .* another place"):
        train(make_values(inputs), tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", PATTERNS)
def test_checkpoints_of_such_a_folder_are_not_opened_to_be_set_aside(tmp_path, pattern):
    """Runs of earlier versions have left some there, which are whole."""
    (tmp_path / PATTERNS[pattern] / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read again"):
        Checkpointer(tmp_path / PATTERNS[pattern], CheckpointConfig(), read_only=True)
    assert [path.name for path in (tmp_path / PATTERNS[pattern]).iterdir()] == ["1"]


def test_home_is_expanded_in_every_path_of_the_config(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    values = {
        "model": {"path": "~/m", "tokenizer": "~/t", "new_tokens": {"file": "~/n"}},
        "data": {
            "train": ["~/a.jsonl", {"path": "~/b.jsonl"}],
            "eval": "~/e.jsonl",
            "chat_template": "~/c.jinja",
            "stream": {"cache_folder": "~/cache", "cache_gibibytes": 1.0},
            "default_system": "~/ is a home",
        },
    }
    config = resolve(values)
    short = {"model": {"path": "~/m"}, "data": {"train": "~/a.jsonl"}}
    student = resolve(short | {"recipe": "distill", "distill": {"teacher": "~/teacher"}})
    found = {
        "distill.teacher": student.distill.teacher,
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "model.new_tokens.file": config.model.new_tokens.file,
        "data.train.path": [source.path for source in config.data.train],
        "data.eval.path": [source.path for source in config.data.eval],
        "data.chat_template": config.data.chat_template,
        "data.stream.cache_folder": config.data.stream.cache_folder,
    }
    assert set(found) == set(PATHS)
    assert list(found.values()) == [
        "/h/teacher",
        "/h/m",
        "/h/t",
        "/h/n",
        ["/h/a.jsonl", "/h/b.jsonl"],
        ["/h/e.jsonl"],
    ] + [
        "/h/c.jinja",
        "/h/cache",
    ]
    assert config.data.default_system == "~/ is a home"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--config=~/c.py:arg", "--workdir=~/w"], {"config": "/h/c.py:arg", "workdir": "/h/w"}),
        (["launch", "--config=~/c.py", "--workdir=~/w", "--target=local:2"], {"config": "/h/c.py", "workdir": "/h/w"}),
        (["preview", "--config=~/c.py", "--html=~/p.html"], {"html": "/h/p.html"}),
        (["export", "--workdir=~/w", "--output=~/o"], {"workdir": "/h/w", "output": "/h/o"}),
        (["import", "~/f.gguf", "~/o"], {"file": "/h/f.gguf", "output": "/h/o"}),
        (["verify", "~/m"], {"model": "/h/m"}),
        (
            ["generate", "--model=~/m", "--input=~/i.jsonl", "--output=~/o.jsonl"],
            {"model": "/h/m", "input": "/h/i.jsonl", "output": "/h/o.jsonl"},
        ),
    ],
)
def test_home_is_expanded_in_every_path_of_the_command_line(monkeypatch, words, expected):
    monkeypatch.setenv("HOME", "/h")
    found = vars(arguments.make_parser().parse_args(words))
    assert {name: found[name] for name in expected} == expected
