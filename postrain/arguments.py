"""The words of the command line: which commands and options there are, and what is meant by a word that is none.

Nothing heavy is imported here: ``--help`` and a wrong word are answered at once.
"""

import argparse
import contextlib
import difflib
import os

from postrain.errors import UserError
from postrain.files import check_text

DESCRIPTION = "Post-training of language models: a Hugging Face folder and your data in, a better folder out."


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes ``--config.KEY=VALUE`` and ``--config.KEY VALUE`` out of the arguments."""
    rest, overrides, words = [], {}, iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
        overrides[key] = value
    return rest, overrides


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line. ``commands``: of the program's parser, those of its commands by name."""

    commands: dict[str, argparse.ArgumentParser] = {}

    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def parse_words(words: list[str]) -> argparse.Namespace:
    """The arguments of a command. Raises UserError for a word that it does not know, with the nearest that it does."""
    parser = make_parser()
    command = parser.commands.get(words[0]) if words else None
    if command is not None:
        known = set(command._option_string_actions)
        options = words[1 : words.index("--")] if "--" in words else words[1:]
        for option in options:
            name = option.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in known:
                raise UserError(f"{option}: {suggest_option(option, known)} (see `{command.prog} --help`)")
    args, stray = parser.parse_known_args(words)
    if stray:
        advice = "a text with spaces needs quotes"
        if command is not None and (stray[0].startswith("-") or "=" in stray[0]):
            advice = suggest_option("--" + stray[0].lstrip("-"), known)
        prog = parser.prog if command is None else command.prog
        raise UserError(f"unexpected word {stray[0]!r}: {advice} (see `{prog} --help`)")
    return args


def suggest_option(option: str, known: set[str]) -> str:
    """What may have been meant by an option that a command does not have: one of its own, or a key of the config."""
    name, equals, value = option.partition("=")
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return f"no such option; did you mean {near[0]}{equals}{value}?"
    if "--config" in known:
        from postrain.config import Config, to_dict
        from postrain.trees import flatten

        keys = list(flatten(to_dict(Config())))
        word = name.removeprefix("--").replace("-", "_")
        by_end = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)} | {key: key for key in keys}
        if near := difflib.get_close_matches(word, by_end, n=1, cutoff=0.8):
            return f"no such option; did you mean --config.{by_end[near[0]]}={value or 'VALUE'}?"
    return f"no such option; there are {', '.join(sorted(known - {'-h'}))}"


def read_whole_number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {word!r}") from None


def read_number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {word!r}") from None


def read_path(word: str) -> str:
    """A path of the command line. The shell leaves the ~ of --workdir=~/run as it is."""
    check_text(word, "path")
    return os.path.expanduser(word)


def read_nonempty_path(word: str) -> str:
    """A path where "" (a variable that is not set) would mean the current folder, and no one later refuses it."""
    if not word:
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return read_path(word)


def read_text(word: str) -> str:
    """A text of the command line, in UTF-8 also where the locale knows ASCII alone."""
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes that are no text in the encoding of the locale
        with contextlib.suppress(UnicodeDecodeError):
            return os.fsencode(word).decode()
    return word


def make_parser() -> Parser:
    parser = Parser(prog="postrain", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, text: str, *, config: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if config:
            text = "the file with get_config(); --config.KEY=VALUE sets a key of it"
            command.add_argument("--config", type=read_path, required=True, metavar="FILE.py[:ARG]", help=text)
        return command

    command = add("train", "train as a config says, from the workdir's newest checkpoint", config=True)
    add_train_arguments(command)

    command = add("launch", "train in several processes, here or on a cluster", config=True)
    add_launch_arguments(command)

    command = add("preview", "show what a config would train on, trained tokens coloured", config=True)
    command.add_argument("--rows", type=read_whole_number, default=3, help="documents to show in full (default 3)")
    command.add_argument("--html", type=read_path, metavar="FILE", help="also write an HTML page (default: none)")

    command = add("plan", "compile a config's step for hardware that need not be present", config=True)
    command.add_argument("--target", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x4, h100:1x8, cpu:8")
    command.add_argument("--json", action="store_true", help="print the report as JSON")

    command = add("teach", "write a teacher's likeliest tokens in a config's rows, to distill", config=True)
    add_teach_arguments(command)

    command = add("export", "write a run's checkpoint as a Hugging Face or PEFT folder")
    add_export_arguments(command)

    command = add("import", "turn a GGUF file (Llama, Qwen2, Qwen3, Gemma 3) into a Hugging Face folder")
    command.add_argument("file", type=read_nonempty_path, metavar="FILE.gguf", help="the file to read")
    command.add_argument("output", type=read_nonempty_path, metavar="OUT", help="a new folder for the model")

    command = add("generate", "answer a prompt, or every line of a JSONL file, with a model")
    add_generate_arguments(command)

    command = add("serve", "answer over HTTP, in OpenAI's and SGLang's words")
    add_serve_arguments(command)

    command = add("score", "score every line of a JSONL file with a reward model or classifier")
    add_score_arguments(command)
    command = add("evaluate-policy", "estimate what a model would earn, from logged decisions")
    add_policy_arguments(command)

    command = add("verify", "compare logits with the reference implementation (needs torch)")
    command.add_argument("model", type=read_path, metavar="MODEL_DIR", help="folder of a model or an adapter")
    command.add_argument("--random", action="store_true", help="with random weights: config.json is enough")
    command.add_argument(
        "--layers", type=read_whole_number, metavar="N", help="with --random: only the first N layers (default: all)"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.commands = commands.choices
    return parser


def add_train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir", type=read_path, required=True, help="the folder of the run: everything is written there"
    )
    several = command.add_argument_group("one of several processes (not needed under SLURM, mpirun and on TPU pods)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; the next port is used too")
    several.add_argument("--num-processes", type=read_whole_number, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=read_whole_number, metavar="I", help="number of this process, from 0")


def add_launch_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir",
        type=read_nonempty_path,
        required=True,
        help="the folder of the run, on a disk that all machines share",
    )
    command.add_argument(
        "--target", required=True, metavar="TARGET", help="local:PROCESSES, slurm:HOSTS, k8s:HOSTS or tpu-pod:NAME"
    )
    text = "GPUs of each host, for slurm and k8s (default 8)"
    command.add_argument("--gpus", type=read_whole_number, default=8, help=text)
    command.add_argument("--image", default="", help="image of the containers, needed for k8s")
    text = "a volume that all hosts share, needed for k8s"
    command.add_argument("--volume", default="", metavar="CLAIM:/PATH", help=text)
    command.add_argument("--dry-run", action="store_true", help="print what would be submitted")


def add_teach_arguments(command: argparse.ArgumentParser) -> None:
    text = "the folder to write; the same command goes on with one that is not finished"
    command.add_argument("--output", type=read_nonempty_path, required=True, metavar="DIR", help=text)
    text = "of the log-probabilities (default float32)"
    command.add_argument("--dtype", choices=("float32", "float16"), default="float32", help=text)
    text = "rows of a file, all of which are in memory (default 512)"
    command.add_argument("--shard-rows", type=read_whole_number, metavar="N", default=512, help=text)


def add_export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workdir", type=read_nonempty_path, required=True, help="the folder of the run")
    command.add_argument(
        "--output", type=read_nonempty_path, required=True, metavar="DIR", help="a new folder for the model"
    )
    command.add_argument("--format", choices=("merged", "adapter"), help="default: the run's export.format")
    command.add_argument("--step", type=read_whole_number, help="step of the checkpoint (default: the newest)")


def add_generate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", type=read_path, required=True, metavar="DIR", help="folder of a model or an adapter"
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", type=read_text, help="one user message; the answer is streamed to the terminal")
    text = 'lines of {"prompt": ...} or {"messages": [...]}'
    what.add_argument("--input", type=read_nonempty_path, metavar="FILE.jsonl", help=text)
    text = "with --input: its lines, each with 'generated' (default: the terminal)"
    command.add_argument("--output", type=read_nonempty_path, metavar="FILE.jsonl", help=text)
    command.add_argument("--system", type=read_text, default="", help="a system message (default: none)")
    command.add_argument("--raw", action="store_true", help="feed the prompt as it is, without the chat template")
    text = "reasoning, if the chat template has a switch (default: its own)"
    command.add_argument("--thinking", choices=("on", "off"), help=text)
    for name, kind, default, text in (
        ("--temperature", read_number, 0.0, "0: the most probable token each time"),
        ("--top-p", read_number, 1.0, "only the most probable tokens that reach this probability; 1: all"),
        ("--top-k", read_whole_number, 0, "only so many most probable tokens; 0: all"),
        ("--max-new-tokens", read_whole_number, 256, "a longer answer is cut"),
        ("--seed", read_whole_number, 0, "of the random numbers, where --temperature is above 0"),
        ("--batch-size", read_whole_number, 32, "lines of --input that are answered together"),
    ):
        command.add_argument(name, type=kind, metavar="N", default=default, help=f"{text} (default {default:g})")


def add_serve_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=read_path, metavar="MODEL", help="folder of a model or an adapter")
    command.add_argument("--name", type=read_text, default="", help="of the model (default: its folder's)")
    text = "address to listen at (default 127.0.0.1, this machine alone)"
    command.add_argument("--host", type=read_text, default="127.0.0.1", help=text)
    text = "that clients send as `Authorization: Bearer KEY` (default: $POSTRAIN_API_KEY, else none is asked for)"
    command.add_argument("--api-key", type=read_text, metavar="KEY", help=text)
    for name, kind, default, text in (
        ("--port", read_whole_number, 8000, "0: any that is free"),
        ("--slots", read_whole_number, 16, "answers computed at a time"),
        ("--waiting", read_whole_number, 256, "answers that wait for a slot; more are refused"),
        ("--steps", read_whole_number, 4, "tokens of an answer that come together"),
        ("--warm-length", read_whole_number, 0, "compile for contexts of so many tokens first; 0: as requests come"),
        ("--max-length", read_whole_number, 0, "tokens of prompt and answer; 0: the model's positions"),
        ("--max-bytes", read_whole_number, 4 << 20, "of a request's body"),
        ("--seconds", read_number, 600.0, "a request that takes longer is ended"),
    ):
        command.add_argument(name, type=kind, metavar="N", default=default, help=f"{text} (default {default:.15g})")


def add_score_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=read_path, metavar="MODEL_DIR", help="folder of *ForSequenceClassification")
    command.add_argument("file", type=read_nonempty_path, metavar="FILE.jsonl", help="rows, or lines of generate")
    text = "the lines, each with 'score' (default: the terminal)"
    command.add_argument("--output", type=read_nonempty_path, metavar="FILE.jsonl", help=text)
    command.add_argument("--system", type=read_text, default="", help="a system message (default: none)")
    command.add_argument("--raw", action="store_true", help="the lines were generated with --raw")
    command.add_argument("--steps", action="store_true", help="'completions' are the steps of one answer")
    text = "packed rows that are scored together (default 8)"
    command.add_argument("--batch-size", type=read_whole_number, metavar="N", default=8, help=text)


def add_policy_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=read_path, metavar="MODEL_DIR", help="folder of a model or an adapter")
    text = "lines with prompt and completion, or messages, reward and propensity; perhaps candidates"
    command.add_argument("file", type=read_nonempty_path, metavar="FILE.jsonl", help=text)
    text = "what the intervals draw again: rows, or all rows of a member (default row)"
    command.add_argument("--by", choices=("row", "member"), default="row", help=text)
    text = "the largest weight of clipped_ips (default 10)"
    command.add_argument("--clip", type=read_number, default=10.0, metavar="N", help=text)
    text = "draws of the bootstrap (default 1000)"
    command.add_argument("--resamples", type=read_whole_number, default=1000, metavar="N", help=text)
    command.add_argument("--seed", type=read_whole_number, default=0, metavar="N", help="of these draws (default 0)")
    text = "packed rows that the model reads together (default 8)"
    command.add_argument("--batch-size", type=read_whole_number, default=8, metavar="N", help=text)
    command.add_argument("--json", action="store_true", help="print the report as JSON")
