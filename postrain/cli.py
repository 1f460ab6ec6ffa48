"""The command line: ``postrain train | launch | preview | plan | teach | export | import | generate | score |
evaluate-policy | verify``.

A user's mistake is one ``error:`` line on stderr and exit code 2, never a traceback. Each command imports the heavy
modules that it needs itself, so that ``--help`` and a wrong key answer at once.
"""

import os
import signal
import sys

# As a program, and not as a module of another one: ^C ends it from here on, before `main` can say so.
if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "postrain":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: (os.write(2, b"error: interrupted\n"), os._exit(130)))

import argparse
import codecs
import contextlib
import dataclasses
import difflib
import errno
import functools
import importlib
import io
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterator

from postrain.errors import UserError
from postrain.files import check_text

DESCRIPTION = "Post-training of language models: a Hugging Face folder and your data in, a better folder out."

# What the preview puts around trained tokens, and around spelt control tokens, for ASCII terminals.
MARKS = {"\u27e6": "[[", "\u27e7": "]]", "\u2039": "<<", "\u203a": ">>"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0; 1 (the machine failed, or a check did not pass); 2 (the user can put it right); 130 (^C); 143 (a process of the
    run has ended).
    """
    as_program = argv is None
    if argv is None:
        argv = sys.argv[1:]
        if os.getpid() == 1:
            from postrain.cluster.stopping import leave_pid_1

            leave_pid_1()
    sys.unraisablehook = report_unraisable
    print_anything()
    try:
        if as_program and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # that of a job in the background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        rest, overrides = split_overrides(argv)
        args = parse_words(rest)
        if overrides and not hasattr(args, "config"):
            raise UserError(f"--config.{next(iter(overrides))}: `postrain {args.command}` has no config")
        code = args.run(args, overrides) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        if as_program:  # a second one, while libraries are put away, has nothing more to say
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
        return _fail("interrupted", 130)
    except BrokenPipeError:  # `postrain preview | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        return _fail(line, 1)


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Has ^C end the process in the block, which is for imports.

    Libraries that try an import take a KeyboardInterrupt for a failed one, and go on half imported.
    """

    def end(number, frame):
        del number, frame
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # the handler of a job in the background
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_anything() -> None:
    """Lets standard output and error take any text: what their encoding lacks is spelled in ASCII or escaped.

    Rows have any character, and the names of files may be no text at all.
    """
    codecs.register_error("escape_missing", escape_missing)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="escape_missing")


def escape_missing(error: UnicodeError) -> tuple[str, int]:
    """The error handler: postrain's own marks as ASCII, other characters escaped so that JSON stays the same JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    return "".join(MARKS.get(character) or json.dumps(character)[1:-1] for character in bad), error.end


def report_unraisable(unraisable) -> None:
    """Prints an error that nobody can catch as Python does, but not those of a library's own threads.

    When the disk is full, threads that write checkpoints print dozens of copies of the main thread's error. A ^C that
    came in a callback of the garbage collector is sent again, a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    # A save that failed on a full disk leaves library coroutines that never run; at exit Python would warn of them.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    return code


def explain(error: Exception) -> str | None:
    """One line for an error of the machine (disk, permissions, memory); None for any other.

    The texts of errors are searched too: the library that writes checkpoints wraps the system's errors.
    """
    text = f"{error} {error.__cause__ or ''}"
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left on device" in text:
        return f"the disk is full{where}: free some space or choose another --workdir, then run the same command again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in text:
        return f"not allowed to write{where}: choose another --workdir or --output"
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return "out of memory: lower data.batch_size or raise train.micro_batches, or set model.remat to 'full'"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}{where}"
    return None


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

    def add(name: str, run: Callable, text: str, *, config: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        if config:
            text = "the file with get_config(); --config.KEY=VALUE sets a key of it"
            command.add_argument("--config", type=read_path, required=True, metavar="FILE.py[:ARG]", help=text)
        return command

    command = add("train", run_train, "train as a config says, from the workdir's newest checkpoint", config=True)
    command.add_argument(
        "--workdir", type=read_path, required=True, help="the folder of the run: everything is written there"
    )
    several = command.add_argument_group("one of several processes (not needed under SLURM, mpirun and on TPU pods)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; the next port is used too")
    several.add_argument("--num-processes", type=read_whole_number, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=read_whole_number, metavar="I", help="number of this process, from 0")

    command = add("launch", run_launch, "train in several processes, here or on a cluster", config=True)
    add_launch_arguments(command)

    command = add("preview", run_preview, "show what a config would train on, trained tokens coloured", config=True)
    command.add_argument("--rows", type=read_whole_number, default=3, help="documents to show in full (default 3)")
    command.add_argument("--html", type=read_path, metavar="FILE", help="also write an HTML page (default: none)")

    command = add("plan", run_plan, "compile a config's step for hardware that need not be present", config=True)
    command.add_argument("--target", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x4, h100:1x8, cpu:8")
    command.add_argument("--json", action="store_true", help="print the report as JSON")

    command = add("teach", run_teach, "write what a teacher finds likely in a config's rows, to distill", config=True)
    add_teach_arguments(command)

    command = add("export", run_export, "write a run's checkpoint as a Hugging Face or PEFT folder")
    command.add_argument("--workdir", type=read_nonempty_path, required=True, help="the folder of the run")
    command.add_argument(
        "--output", type=read_nonempty_path, required=True, metavar="DIR", help="a new folder for the model"
    )
    command.add_argument("--format", choices=("merged", "adapter"), help="default: the run's export.format")
    command.add_argument("--step", type=read_whole_number, help="step of the checkpoint (default: the newest)")

    command = add("import", run_import, "turn a GGUF file (Llama, Qwen2, Qwen3, Gemma 3) into a Hugging Face folder")
    command.add_argument("file", type=read_nonempty_path, metavar="FILE.gguf", help="the file to read")
    command.add_argument("output", type=read_nonempty_path, metavar="OUT", help="a new folder for the model")

    command = add("generate", run_generate, "answer a prompt, or every line of a JSONL file, with a model")
    add_generate_arguments(command)

    command = add("score", run_score, "score every line of a JSONL file with a reward model or classifier")
    add_score_arguments(command)
    command = add("evaluate-policy", run_evaluate_policy, "estimate what a model would earn, from logged decisions")
    add_policy_arguments(command)

    command = add("verify", run_verify, "compare logits with the reference implementation (needs torch)")
    command.add_argument("model", type=read_path, metavar="MODEL_DIR", help="folder of a model or an adapter")
    command.add_argument("--random", action="store_true", help="with random weights: config.json is enough")
    command.add_argument(
        "--layers", type=read_whole_number, metavar="N", help="with --random: only the first N layers (default: all)"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.commands = commands.choices
    return parser


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


def load_checked_config(args, overrides):
    """The config of a command, with the paths that it names checked: all commands refuse the same in the same words."""
    from postrain.config import check_paths, load_config

    config = load_config(args.config, overrides)
    check_paths(config)
    return config


def run_train(args, overrides) -> None:
    from postrain.cluster.discover import find_cluster
    from postrain.cluster.processes import join

    with join(find_cluster(args.coordinator, args.num_processes, args.process_id), explain):
        config = load_checked_config(args, overrides)
        with ends_at_once():
            from postrain.recipes import train

            importlib.import_module(f"postrain.recipes.{config.recipe}")
        train(config, args.workdir)


def run_launch(args, overrides) -> int:
    from postrain.cluster.launch import Job, launch, parse_target
    from postrain.config import load_config

    if parse_target(args.target)[0] in ("local", "slurm"):  # files of other machines cannot be checked here
        load_checked_config(args, overrides)
    else:
        load_config(args.config, overrides)
    words = [f"--config.{key}={value}" for key, value in overrides.items()]
    arguments = ["train", f"--config={args.config}", f"--workdir={args.workdir}", *words]
    job = Job(args.target, arguments, args.workdir, args.gpus, args.image, args.volume)
    return launch(job, dry_run=args.dry_run)


def run_preview(args, overrides) -> None:
    if args.rows < 0:
        raise UserError(f"--rows {args.rows}: expected 0 or more")
    config = load_checked_config(args, overrides)
    with ends_at_once():
        from postrain.data.preview import preview
        from postrain.hf.find_model import locate_model
        from postrain.recipes import find_preparation

    if not config.model.tokenizer:  # the tokenizer is the model's: a model on the hub is needed here, without weights
        path = str(locate_model(config.model.path, weights=False))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
    print(preview(config, html_path=args.html, rows=args.rows, preparation=find_preparation(config)))


def run_plan(args, overrides) -> int:
    from postrain.config import load_config

    config = load_config(args.config, {"data.train": "unread", **overrides})  # no row is read
    os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators of this machine stay free
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's warnings; the report says whether a step is too large
    with ends_at_once():
        from postrain.recipes import plan

        importlib.import_module(f"postrain.recipes.{config.recipe}")
    report = plan(config, args.target)
    print(json.dumps(report.to_dict(), indent=2) if args.json else str(report))
    return 0 if report.fits else _fail(report.format_misfit(), 1)


def run_teach(args, overrides) -> None:
    if args.shard_rows < 1:
        raise UserError(f"--shard-rows {args.shard_rows}: expected at least 1")
    config = load_checked_config(args, overrides)
    with ends_at_once():
        from postrain.training.teach import teach

    say = functools.partial(print, flush=True)
    teach(config, args.output, dtype=args.dtype, shard_rows=args.shard_rows, say=say)
    print(f"wrote {args.output}")


def run_export(args, overrides) -> None:
    with ends_at_once():
        from postrain.export import export_workdir

    print(export_workdir(args.workdir, args.output, args.format, args.step))


def run_import(args, overrides) -> None:
    with ends_at_once():
        from postrain.hf.gguf.convert import import_gguf

    import_gguf(args.file, args.output)
    print(f"wrote {args.output}")


def run_generate(args, overrides) -> None:
    if args.output is not None and args.input is None:
        raise UserError("--output goes with --input: a single --prompt is answered on the terminal")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected at least 1")
    if args.prompt == "" and not args.raw:
        raise UserError("--prompt is empty: write what the user says; only with --raw a model begins from nothing")
    with ends_at_once():
        from postrain.config import check_model_path
        from postrain.rollout.chat import answer_file, answer_prompt, load_chat_model
        from postrain.rollout.sampler import SamplingParams, WrongSetting

    names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
    try:
        sampling = SamplingParams(**{name: getattr(args, name) for name in names})
    except WrongSetting as error:
        option = error.name.replace("_", "-")
        raise UserError(f"--{option} {error.value}: expected {error.rule}") from error
    thinking = {"on": True, "off": False}.get(args.thinking)
    prompt = {"system": args.system, "raw": args.raw, "thinking": thinking}
    check_model_path(args.model, "--model")
    if args.input is not None:
        count = answer_file(args.model, args.input, args.output, sampling, batch_size=args.batch_size, **prompt)
        print(f"{count} answer{'s' * (count != 1)}{f' in {args.output}' if args.output else ''}", file=sys.stderr)
    else:
        write = functools.partial(print, end="", flush=True)
        model = load_chat_model(args.model)
        try:
            answer_prompt(model, args.prompt, sampling, write=write, **prompt)
        finally:
            print()


def run_score(args, overrides) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected at least 1")
    with ends_at_once():
        from postrain.config import check_model_path
        from postrain.rollout.score import score_file

    check_model_path(args.model, "MODEL_DIR")
    options = {"system": args.system, "raw": args.raw, "steps": args.steps, "batch_size": args.batch_size}
    count = score_file(args.model, args.file, args.output, **options)
    print(f"{count} row{'s' * (count != 1)} scored{f' in {args.output}' if args.output else ''}", file=sys.stderr)


def run_evaluate_policy(args, overrides) -> None:
    from postrain.config import check_model_path

    for option, value, least in (
        ("--resamples", args.resamples, 1),
        ("--batch-size", args.batch_size, 1),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            raise UserError(f"{option} {value}: expected at least {least}")
    if not 0 < args.clip < math.inf:
        raise UserError(f"--clip {args.clip:g}: expected a number above 0")
    check_model_path(args.model, "MODEL_DIR")
    with ends_at_once():
        from postrain.rollout.evaluate_policy import evaluate_policy

    options = {"by": args.by, "clip": args.clip, "resamples": args.resamples, "seed": args.seed}
    report = evaluate_policy(args.model, args.file, **options, batch_size=args.batch_size)
    print(json.dumps(report.to_dict(), indent=2) if args.json else str(report))


def run_verify(args, overrides) -> int:
    from postrain.config import check_model_path

    check_model_path(args.model, "MODEL_DIR")
    if args.layers is not None and args.layers < 1:
        raise UserError(f"--layers {args.layers}: expected at least 1; without it all layers are verified")
    if args.layers and not args.random:
        raise UserError("--layers goes with --random: a model's own weights are verified whole")
    with ends_at_once():
        from postrain.hf.verify.compare import verify, verify_random

    report = verify_random(args.model, num_layers=args.layers or 0) if args.random else verify(args.model)
    print(json.dumps(report.to_dict(), indent=2) if args.json else str(report))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
