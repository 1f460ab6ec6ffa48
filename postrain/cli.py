"""The command line: ``postrain train | launch | preview | plan | export | import | generate | verify``.

A user's mistake is one ``error:`` line on stderr and exit code 2, never a traceback. Each command imports the heavy
modules that it needs itself, so that ``--help`` and a wrong key answer at once.
"""

import argparse
import codecs
import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable

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
    if argv is None:
        argv = sys.argv[1:]
        if os.getpid() == 1:
            from postrain.cluster.stopping import leave_pid_1

            leave_pid_1()
    sys.unraisablehook = report_main_thread_only
    print_anything()
    try:
        rest, overrides = split_overrides(argv)
        args = make_parser().parse_args(rest)
        if overrides and not hasattr(args, "config"):
            raise UserError(f"--config.{next(iter(overrides))}: `postrain {args.command}` has no config")
        code = args.run(args, overrides) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # `postrain preview | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        return _fail(line, 1)


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


def report_main_thread_only(unraisable) -> None:
    """Prints an error that nobody can catch as Python does, but not those of a library's own threads.

    When the disk is full, threads that write checkpoints print dozens of copies of the main thread's error.
    """
    if threading.current_thread() is threading.main_thread():
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
    """argparse whose errors are one line."""

    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")


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


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="postrain", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, run: Callable, text: str, *, config: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        if config:
            text = "and --config.KEY=VALUE for any key"
            command.add_argument("--config", type=read_path, required=True, metavar="FILE.py[:ARG]", help=text)
        return command

    command = add("train", run_train, "train as a config says, from the workdir's newest checkpoint", config=True)
    command.add_argument(
        "--workdir", type=read_path, required=True, help="the folder of the run: everything is written there"
    )
    several = command.add_argument_group("one of several processes (not needed under SLURM, mpirun and on TPU pods)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; the next port is used too")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")

    command = add("launch", run_launch, "train in several processes, here or on a cluster", config=True)
    command.add_argument(
        "--workdir",
        type=read_nonempty_path,
        required=True,
        help="the folder of the run, on a disk that all machines share",
    )
    command.add_argument(
        "--target", required=True, metavar="TARGET", help="local:PROCESSES, slurm:HOSTS, k8s:HOSTS or tpu-pod:NAME"
    )
    command.add_argument("--gpus", type=int, default=8, help="GPUs of each host, for slurm and k8s (default 8)")
    command.add_argument("--image", default="", help="image of the containers, for k8s")
    command.add_argument("--volume", default="", metavar="CLAIM:/PATH", help="a volume that all hosts share, for k8s")
    command.add_argument("--dry-run", action="store_true", help="print what would be submitted")

    command = add("preview", run_preview, "show what a config would train on, trained tokens coloured", config=True)
    command.add_argument("--rows", type=int, default=3, help="documents to show in full (default 3)")
    command.add_argument("--html", type=read_path, metavar="FILE", help="also write an HTML page")

    command = add("plan", run_plan, "compile a config's step for hardware that need not be present", config=True)
    command.add_argument("--target", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x4, h100:1x8, cpu:8")
    command.add_argument("--json", action="store_true", help="print the report as JSON")

    command = add("export", run_export, "write a run's checkpoint as a Hugging Face or PEFT folder")
    command.add_argument("--workdir", type=read_nonempty_path, required=True)
    command.add_argument("--output", type=read_nonempty_path, required=True, metavar="DIR")
    command.add_argument("--format", choices=("merged", "adapter"), help="default: the run's export.format")
    command.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")

    command = add("import", run_import, "turn a GGUF file (Llama, Qwen2, Qwen3, Gemma 3) into a Hugging Face folder")
    command.add_argument("file", type=read_nonempty_path, metavar="FILE.gguf")
    command.add_argument("output", type=read_nonempty_path, metavar="OUT")

    command = add("generate", run_generate, "answer a prompt, or every line of a JSONL file, with a model")
    add_generate_arguments(command)

    command = add("verify", run_verify, "compare logits with the reference implementation (needs torch)")
    command.add_argument("model", type=read_path, metavar="MODEL_DIR", help="folder of a model or an adapter")
    command.add_argument("--random", action="store_true", help="with random weights: config.json is enough")
    command.add_argument("--layers", type=int, metavar="N", help="with --random: only the first N layers")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def add_generate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", type=read_path, required=True, metavar="DIR", help="folder of a model or an adapter"
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", type=read_text, help="one user message; the answer is streamed to the terminal")
    text = 'lines of {"prompt": ...} or {"messages": [...]}'
    what.add_argument("--input", type=read_nonempty_path, metavar="FILE.jsonl", help=text)
    command.add_argument(
        "--output", type=read_nonempty_path, metavar="FILE.jsonl", help="with --input: its lines, each with 'generated'"
    )
    command.add_argument("--system", type=read_text, default="", help="a system message")
    command.add_argument("--raw", action="store_true", help="feed the prompt as it is, without the chat template")
    command.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="reasoning, if the chat template has a switch (default: its own)",
    )
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0, help="0: off")
    command.add_argument("--max-new-tokens", type=int, default=256)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=32, help="lines generated together")


def load_checked_config(args, overrides):
    """The config of a command, with the paths that it names checked: all commands refuse the same in the same words."""
    from postrain.config import check_paths, load_config

    config = load_config(args.config, overrides)
    check_paths(config)
    return config


def run_train(args, overrides) -> None:
    from postrain.cluster.discover import find_cluster
    from postrain.cluster.processes import join
    from postrain.cluster.stopping import ends_at_once

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
    from postrain.data.preview import preview

    if not config.model.tokenizer:  # the tokenizer is the model's: a model on the hub is needed here, without weights
        from postrain.hf.find_model import locate_model

        path = str(locate_model(config.model.path, weights=False))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
    print(preview(config, html_path=args.html, rows=args.rows))


def run_plan(args, overrides) -> int:
    from postrain.config import load_config

    config = load_config(args.config, {"data.train": "unread", **overrides})  # no row is read
    os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators of this machine stay free
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's warnings; the report says whether a step is too large
    from postrain.recipes import plan

    report = plan(config, args.target)
    print(json.dumps(report.to_dict(), indent=2) if args.json else str(report))
    return 0 if report.fits else _fail(report.format_misfit(), 1)


def run_export(args, overrides) -> None:
    from postrain.export import export_workdir

    print(export_workdir(args.workdir, args.output, args.format, args.step))


def run_import(args, overrides) -> None:
    from postrain.hf.gguf.convert import import_gguf

    import_gguf(args.file, args.output)
    print(f"wrote {args.output}")


def run_generate(args, overrides) -> None:
    if args.output is not None and args.input is None:
        raise UserError("--output goes with --input: a single --prompt is answered on the terminal")
    from postrain.config import check_model_path
    from postrain.rollout.chat import answer_file, answer_prompt, load_chat_model
    from postrain.rollout.sampler import SamplingParams

    sampling = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    thinking = {"on": True, "off": False}.get(args.thinking)
    prompt = {"system": args.system, "raw": args.raw, "thinking": thinking}
    check_model_path(args.model, "--model")
    if args.input is not None:
        count = answer_file(args.model, args.input, args.output, sampling, batch_size=args.batch_size, **prompt)
        print(f"{count} answer{'s' * (count != 1)}{f' in {args.output}' if args.output else ''}", file=sys.stderr)
    else:
        write = functools.partial(print, end="", flush=True)
        answer_prompt(load_chat_model(args.model), args.prompt, sampling, write=write, **prompt)
        print()


def run_verify(args, overrides) -> int:
    from postrain.config import check_model_path

    check_model_path(args.model, "MODEL_DIR")
    if args.layers is not None and args.layers < 1:
        raise UserError(f"--layers {args.layers}: expected at least 1; without it all layers are verified")
    if args.layers and not args.random:
        raise UserError("--layers goes with --random: a model's own weights are verified whole")
    from postrain.hf.verify.compare import verify, verify_random

    report = verify_random(args.model, num_layers=args.layers or 0) if args.random else verify(args.model)
    print(json.dumps(report.to_dict(), indent=2) if args.json else str(report))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
