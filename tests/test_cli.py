"""The command line: quick to start, one line for a mistake, the right exit code."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest
from tiny_models import make_tiny_model

from postrain import arguments, cli
from postrain.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("cli") / "model", "llama", vocab_size=301)


TRAIN = ("train", "--config=configs/sft.py", "--workdir=nowhere")


def run(*words):
    command = [sys.executable, "-m", "postrain.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


def errors_of(capsys, *words):
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return code, captured.err


def test_help_names_every_command_and_no_other():
    result = run("--help")
    assert result.returncode == 0
    listed = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("    ") and line[4] != " "]
    expected = "train launch preview plan teach export import generate serve score evaluate-policy verify"
    assert listed == expected.split()


def test_start_up_loads_nothing_heavy():
    script = (
        "import sys, postrain, postrain.cli, postrain.arguments as a; a.make_parser(); "
        "print([m for m in ('jax', 'numpy', 'transformers')"
    )
    result = subprocess.run([sys.executable, "-c", script + " if m in sys.modules])"], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_wrong_key_is_answered_before_anything_heavy_is_loaded():
    words = ["train", "--config=configs/sft.py", "--workdir=nowhere", "--config.optimizer.learning_rat=1"]
    script = (
        f"import sys, postrain.cli as c; code = c.main({words}); "
        "print([m for m in ('jax', 'transformers', 'grain') if m in sys.modules]); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (2, "[]\n")
    assert result.stderr == (
        "error: config key 'optimizer.learning_rat' does not exist; did you mean 'optimizer.learning_rate'?\n"
    )
    assert not (ROOT / "nowhere").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
        (["train", "--config=configs/sft.py"], "the following arguments are required: --workdir"),
        (["train", "--config=nope.py", "--workdir=x"], "--config: no file nope.py"),
        (
            ["train", "--config=configs/sft.py", "--workdir=x", "--config.data.train"],
            "--config.data.train needs a value",
        ),
        (["verify", "x", "--config.data.seed=1"], "`postrain verify` has no config"),
        (["generate", "--model=x", "--prompt=hi", "--output=o"], "--output goes with --input"),
        (["generate", "--model=x", "--prompt=hi", "--top-p=2"], "--top-p 2.0: expected above 0 and at most 1"),
        (["generate", "--model=x", "--prompt=hi", "--max-new-tokens=0"], "--max-new-tokens 0: expected 1 to 16777216"),
        (["generate", "--model=x", "--prompt=hi", "--batch-size=0"], "--batch-size 0: expected at least 1"),
        (["generate", "--model=x", "--input=f", "--top-k=1.5"], "--top-k: expected a whole number, found '1.5'"),
        (
            ["generate", "--model=x", "--prompt=hi", "--temperature=hot"],
            "--temperature: expected a number, found 'hot'",
        ),
        (["generate", "--model=x", "--prompt="], "--prompt is empty: write what the user says"),
        (["generate", "--model=x", "--promt=hi"], "--promt=hi: no such option; did you mean --prompt=hi? (see"),
        (["generate", "--model=x", "--prompt=hi", "you"], "unexpected word 'you': a text with spaces needs quotes"),
        (
            ["export", "--step=1", "-workdir=x", "--output=y", "--workdir=z"],
            "word '-workdir=x': no such option; did you",
        ),
        ([*TRAIN, "--steps=3"], "--steps=3: no such option; did you mean --config.train.steps=3? (see"),
        ([*TRAIN, "--step", "77"], "--step: no such option; did you mean --config.train.steps=VALUE?"),
        ([*TRAIN, "--batch-size=4"], "did you mean --config.data.batch_size=4?"),
        (
            [*TRAIN, "train.steps=3"],
            "unexpected word 'train.steps=3': no such option; did you mean --config.train.steps=3?",
        ),
        ([*TRAIN, "--frobnicate"], "--frobnicate: no such option; there are --config, --coordinator, --help, --num-"),
        ([*TRAIN, "extra"], "unexpected word 'extra': "),
        ([*TRAIN, "--config.train.steps=few"], "config key 'train.steps' must be a whole number, found 'few'"),
        ([*TRAIN, "--config.optimizer.eps=none"], "config key 'optimizer.eps' must be a number, found 'none'"),
        ([*TRAIN, "--config.data.shuffle=1"], "config key 'data.shuffle' must be true or false, found 1"),
        (["generate", "--model=nowhere", "--prompt=hi"], "--model = 'nowhere' is a folder that does not exist"),
        (
            ["generate", "--model=Qwen/Qwen3-0.6B", "--prompt=hi"],
            "does not hold it, and HF_HUB_OFFLINE is set: unset it",
        ),
        (["export", "--workdir=nowhere", "--output=x"], "nowhere: no run in it, expected nowhere/config.json"),
        (["import", "nowhere.gguf", "out"], "nowhere.gguf: expected a GGUF file, found nothing of that name: check"),
        (["import", "configs", "out"], "configs: expected a GGUF file, found a folder: give the .gguf file itself"),
        (["import", "x.gguf", ""], "argument OUT: is empty, expected a path"),
        (
            ["launch", "--config=configs/sft.py", "--workdir=", "--target=slurm:2", "--dry-run"],
            "argument --workdir: is empty, expected a path",
        ),
        (["export", "--workdir=x", "--output="], "argument --output: is empty, expected a path"),
        (["generate", "--model=x", "--input="], "argument --input: is empty, expected a path"),
        (["generate", "--model=", "--prompt=hi"], "--model is empty: give the folder of a model, or its name on the"),
        (["generate", "--model=models/qwen", "--prompt=hi"], "models/qwen is not a folder here, and the cache"),
        (["verify", "nowhere"], "MODEL_DIR = 'nowhere' is a folder that does not exist"),
        (
            ["train", "--config=configs", "--workdir=x"],
            "--config: configs is a folder, expected NAME.py, such as config",
        ),
        (
            ["train", "--config=configs/sft.py:fulll", "--workdir=x"],
            "--config=configs/sft.py:fulll: no variant 'fulll', there are lora, full (configs/sft.py:",
        ),
    ],
)
def test_mistakes_are_one_line_and_code_2(capsys, words, message):
    code, error = errors_of(capsys, *words)
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"architectures": ["LlamaForCausalLM"]}',
            "expected the workdir of a run, found a config.json of something else",
        ),
        ("[1]", "expected the workdir of a run"),
        ("{", "it cannot be read as JSON"),
    ],
)
def test_export_of_a_folder_without_a_run(capsys, tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    code, error = errors_of(capsys, "export", f"--workdir={tmp_path}", f"--output={tmp_path / 'out'}")
    assert code == 2 and words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.sequence_length", "99999999999", "config key 'data.sequence_length' must be at most"),
        ("train.seed", "99999999999999999999", "config key 'train.seed' must be at most"),
        ("mesh.data", "0", "config key 'mesh.data' must be at least 1 (or -1), found 0"),
        ("optimizer.b2", "1", "config key 'optimizer.b2' must be below 1"),
        ("checkpoint.keep", "0", "config key 'checkpoint.keep' must be at least 1"),
        ("model.path", "Qwen/Qwen3-0.6B", "does not hold it, and HF_HUB_OFFLINE is set: unset it"),
        (
            "model.path",
            "nowhere",
            "is a folder that does not exist: give the folder of a model, or its name on the Hug",
        ),
        ("model.path", "", "config key 'model.path' is empty"),
        ("model.lora.targets", "q,x", "config key 'model.lora.targets' must be one of q, k, v"),
    ],
)
def test_preview_refuses_what_train_does_in_the_same_words(model, tmp_path, monkeypatch, capsys, key, value, words):
    monkeypatch.chdir(ROOT)
    given = [f"--config.model.path={model}", "--config.data.train=t.jsonl", f"--config.{key}={value}"]
    found = errors_of(capsys, "preview", "--config=configs/sft.py", *given)
    assert found[0] == 2 and words in found[1]
    workdir = tmp_path / "new" / "run"
    assert errors_of(capsys, "train", "--config=configs/sft.py", f"--workdir={workdir}", *given) == found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", "--config=c.py", "--workdir=gs://b/run"], "--workdir"),
        (["launch", "--config=c.py", "--workdir=gs://b/run", "--target=slurm:2", "--dry-run"], "--workdir"),
        (["export", "--workdir=gs://b/run", "--output=out"], "--workdir"),
        (["export", "--workdir=run", "--output=gs://b/run"], "--output"),
        (["preview", "--config=c.py", "--html=gs://b/run"], "--html"),
        (["generate", "--model=model", "--input=rows.jsonl", "--output=gs://b/run"], "--output"),
    ],
)
def test_the_address_of_a_storage_is_refused_as_a_place_to_write(model, tmp_path, monkeypatch, capsys, words, name):
    """Else it would become a folder `gs:` on this machine, and be lost with it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values = {"model": {"path": "model"}, "data": {"train": "rows.jsonl"}}
    (tmp_path / "c.py").write_text(f"def get_config(arg=None):\n    return {values!r}\n")
    before = sorted(tmp_path.iterdir())
    code, error = errors_of(capsys, *words)
    assert code == 2 and f"{name} gs://b/run: expected a path of this machine, found the address of a storage" in error
    assert sorted(tmp_path.iterdir()) == before


def test_overrides_are_separated_from_the_other_arguments():
    rest, overrides = arguments.split_overrides(
        ["train", "--config.a.b=1=2", "--config=x.py", "--config.c", "word", "--workdir=w"]
    )
    assert rest == ["train", "--config=x.py", "--workdir=w"]
    assert overrides == {"a.b": "1=2", "c": "word"}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (KeyboardInterrupt("the same command goes on"), 130, "error: interrupted: the same command goes on\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "the disk is full (runs/x): free some space"),
        (ValueError("RESOURCE_EXHAUSTED: [No space left on device]"), 1, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 1, "not allowed to write (runs/x)"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
            1,
            "out of memory: lower data.batch_size",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 1, "No such file or directory (a.txt)"),
    ],
)
def test_an_error_of_the_machine_is_one_line(monkeypatch, capsys, error, code, words):
    def fail(args, overrides):
        raise error

    monkeypatch.setattr(cli, "run_import", fail)
    found, line = errors_of(capsys, "import", "a", "b")
    assert found == code
    assert words in line


def run_as_program(text, *words):
    """The command line with ``text`` run before it, as `python -m postrain.cli WORDS`."""
    start = f"""
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ['postrain', *{list(words)}]
{text}
runpy.run_module('postrain.cli', run_name='__main__')
"""
    return subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, cwd=ROOT)


# In the first moments; while a library is loaded that takes it for a failed import; in the garbage collector.
@pytest.mark.parametrize(
    "text",
    [
        """
import builtins
real = builtins.__import__
def load(name, *rest, **named):
    if name == "argparse":
        signal.raise_signal(signal.SIGINT)
    return real(name, *rest, **named)
builtins.__import__ = load
""",
        """
class Finder:
    def find_spec(self, name, *rest):
        if name == "postrain.hf.gguf.convert":
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                pass
sys.meta_path.insert(0, Finder())
""",
        """
import time, types
class Trash:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def import_gguf(*paths):
    Trash()
    time.sleep(10)
    sys.exit("went on")
sys.modules["postrain.hf.gguf.convert"] = types.SimpleNamespace(import_gguf=import_gguf)
""",
    ],
)
def test_an_interrupt_is_one_line_at_any_time(text):
    result = run_as_program(text, "import", "a.gguf", "b")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


def test_a_second_interrupt_at_the_end_says_nothing_more():
    text = """
import atexit, types
def import_gguf(*paths):
    atexit.register(signal.raise_signal, signal.SIGINT)
    raise KeyboardInterrupt
sys.modules["postrain.hf.gguf.convert"] = types.SimpleNamespace(import_gguf=import_gguf)
"""
    result = run_as_program(text, "import", "a.gguf", "b")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


def test_every_option_has_a_help_and_says_its_default():
    for name, command in arguments.make_parser().commands.items():
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings}"
            if action.option_strings and not action.required and action.nargs != 0 and name not in ("train", "launch"):
                assert "default" in action.help or action.dest in ("prompt", "input"), f"{name} {action.option_strings}"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(args, overrides):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run_import", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["import", "a", "b"])


def test_generate_answers_a_file(model, tmp_path, capsys):
    rows = [{"prompt": "hi", "id": 7}, {"messages": [{"role": "user", "content": "hi"}]}]
    source, output = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = cli.main(["generate", f"--model={model}", f"--input={source}", f"--output={output}", "--max-new-tokens=4"])
    assert code == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in answer.items() if k != "generated"} for answer in answers] == rows
    assert answers[0]["generated"] == answers[1]["generated"]
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:2: not valid JSON"),
        ("[]", "in.jsonl:2: expected a JSON object, found list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "in.jsonl:2: messages[0].role must be one of"),
    ],
)
def test_generate_names_the_bad_line(model, tmp_path, capsys, line, message):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "hi"}\n' + line + "\n")
    code, error = errors_of(capsys, "generate", f"--model={model}", f"--input={source}")
    assert code == 2
    assert message in error


def test_generate_streams_what_it_returns(model, capsys):
    assert cli.main(["generate", f"--model={model}", "--prompt=hi", "--max-new-tokens=6"]) == 0
    streamed = capsys.readouterr().out
    source = model.parent / "one.jsonl"
    source.write_text('{"prompt": "hi"}\n')
    assert cli.main(["generate", f"--model={model}", f"--input={source}", "--max-new-tokens=6"]) == 0
    assert json.loads(capsys.readouterr().out)["generated"]["text"] + "\n" == streamed


def test_a_closed_pipe_ends_it_without_a_word(tmp_path):
    script = f"{sys.executable} -m postrain.cli --help | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.stderr == ""
