"""What commands print on a terminal of ASCII, and into a file."""

import json
import os
import re
import subprocess
import sys

import pytest
from sft_runs import make_values, write_config

from postrain import cli

ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMMANDS = """
import json, sys
from postrain.cli import main
for words in json.loads(sys.argv[1]):
    print("$", words[0], main(words), flush=True)
"""


def run_commands(*commands):
    """Standard output and error of several commands in one process, with a line ``$ COMMAND CODE`` after each."""
    words = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    result = subprocess.run(words, capture_output=True, env=os.environ | ASCII, timeout=240)
    return result.stdout.decode("ascii"), result.stderr.decode("ascii")


def test_every_command_prints_ascii_lines_where_the_terminal_knows_no_other(inputs, tmp_path):
    """In a locale whose encoding is ASCII for the names of files, too."""
    question = [{"role": "user", "content": "é 東京 🚲"}, {"role": "assistant", "content": "ja…"}]
    rows = "\n".join(json.dumps({"messages": question, "id": i}, ensure_ascii=False) for i in range(4))
    (tmp_path / "odd.jsonl").write_text(rows, encoding="utf-8-sig")  # begins with a byte order mark
    data = {"train": str(tmp_path / "odd.jsonl"), "eval": str(tmp_path / "odd.jsonl"), "sequence_length": 96}
    values = make_values(inputs, data=data, train={"steps": 1}, eval={"generate_rows": 0}, export={"format": "none"})
    config = write_config(tmp_path / "c.py", values)
    commands = [
        ["preview", f"--config={config}", "--rows=1"],
        ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"],
        ["generate", f"--model={inputs / 'model'}", f"--input={tmp_path / 'odd.jsonl'}", "--max-new-tokens=2"],
        ["generate", f"--model={inputs / 'model'}", "--prompt=é", "--max-new-tokens=2"],
        ["train", f"--config={config}", f"--workdir={tmp_path / 'é'}"],
        ["plan", f"--config={config}", "--target=cpu:1"],
    ]
    output, errors = run_commands(*commands)
    assert re.findall(r"^\$ (\w+ \d)$", output, re.M) == [
        "preview 0",
        "train 0",
        "generate 0",
        "generate 0",
        "train 2",
        "plan 0",
    ], output + errors
    assert re.search(r"user\n\\u00e9 \\u6771\\u4eac \\ud83d\\udeb2.*\n.*\n\[\[ja\\u2026", output), output
    answered = [json.loads(line) for line in output.splitlines() if line.startswith('{"messages')]
    assert [row["messages"] for row in answered] == [question] * 4, "escaped, it is the same JSON"
    assert "Traceback" not in errors
    assert re.search(r"^error: path '\S+\\xe9': expected a path in UTF-8, .* set LC_ALL=C.UTF-8, or", errors, re.M)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", output), "a control character or carriage return in a log file"


@pytest.mark.slow
def test_verify_does_too(inputs):
    output, errors = run_commands(["verify", str(inputs / "model")])
    assert output.endswith("$ verify 0\n"), output + errors


def test_what_a_terminal_has_no_character_for_is_spelled():
    for text, expected in (
        ("⟦a⟧", b"[[a]]"),
        ("é 🚲", rb"\u00e9 \ud83d\udeb2"),
        ("a\udcff", rb"a\udcff"),  # of the name of a file
    ):
        cli.codecs.register_error("escape_missing", cli.escape_missing)
        assert text.encode("ascii", "escape_missing") == expected
    assert "é⟦".encode("latin-1", "escape_missing") == b"\xe9[["
