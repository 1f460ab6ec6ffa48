"""The command line: ``postrain train | launch | preview | plan | teach | export | import | generate | serve |
score | evaluate-policy | verify``.

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

import codecs
import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import json
import math
import threading
import warnings
from collections.abc import Iterator

from postrain.arguments import parse_words, split_overrides
from postrain.errors import UserError

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
        run = globals()[f"run_{args.command.replace('-', '_')}"]  # each command has its function below
        code = run(args, overrides) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        if as_program:  # a second one, while libraries are put away, has nothing more to say
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
        return _fail(": ".join(["interrupted", *map(str, error.args)]), 130)
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
        from postrain.recipes import describe_rows, find_preparation

    if not config.model.tokenizer:  # the tokenizer is the model's: a model on the hub is needed here, without weights
        path = str(locate_model(config.model.path, weights=False))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
    options = {"preparation": find_preparation(config), "describe": functools.partial(describe_rows, config)}
    print(preview(config, html_path=args.html, rows=args.rows, **options))


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
        from postrain.training.teaching.teach import teach

    say = functools.partial(print, flush=True)
    try:
        teach(config, args.output, dtype=args.dtype, shard_rows=args.shard_rows, say=say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on from the shards in {args.output}") from None
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
        from postrain.rollout.requests import SamplingParams, WrongSetting

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


def run_serve(args, overrides) -> None:
    from postrain.config import check_model_path
    from postrain.files import check_text

    leasts = {"slots": 1, "waiting": 0, "steps": 1, "warm_length": 0, "max_length": 0, "max_bytes": 1}
    for option, least in leasts.items():
        if getattr(args, option) < least:
            name = option.replace("_", "-")
            raise UserError(f"--{name} {getattr(args, option)}: expected at least {least}")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}: expected 0 (any that is free) to 65535")
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds {args.seconds:g}: expected a number above 0")
    api_key = args.api_key if args.api_key is not None else os.environ.get("POSTRAIN_API_KEY", "")
    check_text(api_key, "API key")
    check_model_path(args.model, "MODEL")
    with ends_at_once():
        from postrain.serve.limits import Limits
        from postrain.serve.server import serve

    limits = Limits(**{name: getattr(args, name) for name in (*leasts, "seconds")}, api_key=api_key)
    name = args.name or os.path.basename(os.path.normpath(args.model))
    serve(args.model, name=name, host=args.host, port=args.port, limits=limits)


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
