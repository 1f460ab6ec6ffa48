"""Training runs that are killed (SIGKILL), started again, killed again, and end in the bytes of a run that never was.

    python tests/faults/kills.py --kills=30              # one process a run
    python tests/faults/kills.py --kills=1000 --write    # and writes the figures into docs/reliability.md
    python tests/faults/kills.py --kills=30 --processes=2  # two processes x four devices, either of which is killed
    python tests/faults/kills.py --kills=30 --streamed     # two sources of an object store, mixed, with a piece cache
    python tests/faults/kills.py --kills=30 --reward       # of another objective, as --help lists them
    python tests/faults/kills.py --kills=30 --kto --head   # a share of the kills in runs of each

``--write`` adds to what the page has of other seeds.

An instant to be killed at is drawn from those that an undisturbed run passes: each file that Python opens to write,
each rename, removal, new folder and fsync in the workdir, and each batch of the data worker, update, line of a tracker,
batch of an evaluation and answer. Every kind has the same chance, however often it happens. Half of the kills come at
the instant itself, in the thread that is there; the others up to 30 ms later, wherever the run is then: in what
TensorStore and safetensors write without Python, in a compiled step.

This process imports what a run needs, starts no backend of JAX, and forks each run: the import is paid for once.
"""

import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import importlib
import json
import os
import pathlib
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "recipes"), str(HERE.parent / "benchmarks")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parents[1] / "build" / "jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

LATER = 0.03  # seconds after an instant
STEPS, SPIKE = 28, 23  # updates of a run; the one that is rolled back
DEVICES = 4  # of each of several processes
LIMIT = 600  # seconds that a run may take
SURVIVORS_LIMIT = 30  # seconds that it may outlive one of its processes
CACHE, CACHE_BYTES = "cache", 6000  # of pieces, beside the workdirs; it holds about half of the data
FILE_ROWS = 4  # of a file of the streamed data
LOST_CODE = 143  # of the processes that one was killed of
AUDITED = {"open": 0, "os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0}  # event -> argument: the path
CALLS = {  # what is called at instants of the run that write nothing
    "data worker": ("postrain.data.batches.in_memory", "_assemble_batch"),
    "stream worker": ("postrain.data.batches.streamed", "ShardBatches.next_batch"),
    "stream position": ("postrain.data.batches.streamed", "ShardedBatches.get_state"),
    "stream restored": ("postrain.data.batches.shard", "Shard.read"),
    "storage": ("postrain.data.files.storage", "_fetch"),
    "update": ("postrain.training.rows", "Rows.__next__"),
    "metrics line": ("postrain.report.metrics", "_to_number"),
    "tracker": ("postrain.report.metrics", "TensorBoard.write"),
    "evaluation": ("postrain.training.evaluate", "compute_eval_loss"),
    "answers": ("postrain.rollout.answers", "answer_questions"),
    "reference": ("postrain.training.reference", "_compute"),
    "teacher": ("postrain.training.teaching.teacher", "load_teacher"),
    "export checked": ("postrain.export", "check_logits"),
    "report": ("postrain.training.session", "write_report"),
}


class Instants:
    """Counts the instants that this process passes, by kind, and kills it at one of them."""

    def __init__(self, workdir: pathlib.Path, plan: dict | None):
        """``plan``: {"kind", "number", "later": seconds}, None: only count; with "errno" the process is not killed, but
        from then on nothing can be written in the workdir.
        """
        self.counts, self._plan, self._broken = collections.Counter(), plan, False
        self._roots = {f"{workdir}/": "", f"{workdir.parent / CACHE}/": f"{CACHE}/"}
        sys.addaudithook(self._audit)
        for kind, (module, name) in CALLS.items():
            owner = importlib.import_module(module)
            *parents, name = name.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, name, self._counted(kind, getattr(owner, name)))
        os.fsync = self._counted_fsync(os.fsync)

    def _counted(self, kind, call):
        def counted(*arguments, **options):
            self.pass_by(kind)
            return call(*arguments, **options)

        return counted

    def _counted_fsync(self, call):
        def counted(descriptor):
            self._pass_path("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            return call(descriptor)

        return counted

    def _audit(self, event, arguments):
        if event not in AUDITED or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self._pass_path(event.removeprefix("os."), os.fspath(arguments[0]))

    def _pass_path(self, what, path):
        for root in (root for root in self._roots if path.startswith(root)):
            name = re.sub(r"[0-9a-f]{16,}|events\.out.*|\d+", "N", path.removeprefix(root))
            self.pass_by(f"{what} {self._roots[root]}{name}")
            if self._broken and (what in ("open", "mkdir", "fsync") or self._plan["errno"] == errno.EROFS):
                raise OSError(self._plan["errno"], os.strerror(self._plan["errno"]), path)

    def pass_by(self, kind: str) -> None:
        self.counts[kind] += 1
        plan = self._plan
        if plan and (kind, self.counts[kind]) == (plan["kind"], plan["number"]):
            if "errno" in plan:
                self._broken = True
            elif plan["later"]:
                threading.Thread(target=lambda: (time.sleep(plan["later"]), kill()), daemon=True).start()
            else:
                kill()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fork(work, log: pathlib.Path) -> int:
    """Runs ``work`` in a process of its own, its output in ``log``; returns its wait status."""
    return wait([start(work, log)], log)[0]


def fork_all(work, log: pathlib.Path, processes: int) -> tuple[int, float]:
    """Runs ``work(index, port)`` in several processes; returns the wait status of the first that failed, or was killed,
    and the seconds that the others took to end by themselves, each with the code of which launchers start it again.
    """
    port = importlib.import_module("postrain.cluster.launch").find_ports()
    os.environ.setdefault("POSTRAIN_SECRET", secrets.token_hex(32))
    return wait([start(functools.partial(work, index, port), log) for index in range(processes)], log)


def wait(children: list[int], log: pathlib.Path) -> tuple[int, float]:
    first, ends, deadline = None, {}, time.monotonic() + LIMIT
    while len(ends) < len(children):
        for child in children:
            done, status = (0, 0) if child in ends else os.waitpid(child, os.WNOHANG)
            if done:
                ends[child] = status
        if first is None and any(ends.values()):
            first, deadline = time.monotonic(), min(deadline, time.monotonic() + SURVIVORS_LIMIT)
            for child in set(children) - ends.keys():
                os.kill(child, signal.SIGCONT)  # one that a test has stopped
        if time.monotonic() > deadline:
            for child in set(children) - ends.keys():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise SystemExit(f"a run takes longer than {LIMIT} s, or survives others:\n{log.read_text()}")
        time.sleep(0.005)
    codes = [os.waitstatus_to_exitcode(status) for status in ends.values()]
    if -signal.SIGKILL in codes:
        others = [code for code in codes if code != -signal.SIGKILL]
        if set(others) - {0, LOST_CODE}:  # 0: it was killed when all had left
            raise SystemExit(f"others of a killed process ended with {others}, not {LOST_CODE}:\n{log.read_text()}")
        return signal.SIGKILL, time.monotonic() - first
    return next(filter(None, ends.values()), 0), time.monotonic() - (first or time.monotonic())


def start(work, log: pathlib.Path) -> int:
    """Starts ``work`` in a process of its own; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            work()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def make_values(inputs: pathlib.Path, way: str = "1") -> dict:
    """Config values of a run: ``way`` is "1" or "2" processes, "streamed", or a recipe or loss of ``main``."""
    import sft_runs

    values = sft_runs.make_values(
        inputs,
        model={"lora": {"rank": 0}},
        data={"sequence_length": 64, "shuffle": False, "packing": "none"},
        optimizer={"learning_rate": 1e-2, "ema_decay": 0.9, "schedule": "constant"},
        train={"steps": STEPS, "spike": {"policy": "skip", "threshold": 4.0}},
        eval={"every": 14, "generate_rows": 2, "max_new_tokens": 4, "before": False},
        checkpoint={"every": 4},
        trackers={"tensorboard": True},
    )
    if way == "2":  # a row a device; the odd row is one of many there, and no spike
        values["data"]["batch_size"] = values["eval"]["batch_size"] = 2 * DEVICES
        values["train"] = {"steps": 6}
        values["eval"] |= {"every": 4, "generate_rows": 0}
        values["checkpoint"]["every"] = 2
    if way == "streamed":
        names = {"first": 3.0, "second": 1.0}
        values["data"]["train"] = [{"path": f"s3://corpus/{name}-*.jsonl", "weight": w} for name, w in names.items()]
        cache = {"cache_folder": str(inputs.parent / CACHE), "cache_gibibytes": CACHE_BYTES / 2**30}
        values["data"] |= {"streaming": True, "packing_window": 12, "stream": {"shards": 2} | cache}
        # Two documents a row, so that windows leave some to the next; with this seed the odd row is a spike, at 23.
        values["data"] |= {"packing": "best_fit", "shuffle": True, "seed": 10, "sequence_length": 96}
        values["train"]["spike"]["threshold"] = 3.5
    if way in ("preference", "kto", "reward"):
        name = "answers" if way == "kto" else "pairs"
        rows = {"train": str(inputs / f"{name}.jsonl"), "eval": str(inputs / f"{name}_eval.jsonl")}
        values["data"] |= rows | {"sequence_length": 96}
        values["recipe"], values["optimizer"]["learning_rate"] = "reward" if way == "reward" else "preference", 1e-3
        values["train"], values["checkpoint"]["every"] = {"steps": 6}, 2
        values["eval"] |= {"every": 3, "generate_rows": 0, "loss_rows": 3}
    if way == "kto":
        values["preference"] = {"loss": "kto", "reference": "live"}
    if way == "head":
        values["data"]["train"] = str(inputs / "rated.jsonl")
        values["train"], values["checkpoint"]["every"], values["eval"]["every"] = {"steps": 6}, 2, 3
        values["sft"] = {"weights": {"mode": "advantage", "baseline": "head", "temperature": 0.5}}
        values["optimizer"]["head_learning_rate"] = 1e-2
    if way == "reward":
        values["model"]["lora"] = {"rank": 4}
        values["reward"], values["optimizer"]["head_learning_rate"] = {"centering_coef": 0.01}, 1e-2
    if way == "distill":
        values["recipe"], values["distill"] = "distill", {"teacher": str(inputs / "teacher"), "loss": "jsd"}
        values["train"], values["checkpoint"]["every"], values["eval"]["every"] = {"steps": 6}, 2, 3
    return values


def make_inputs(folder: pathlib.Path) -> None:
    """Those of ``sft_runs``, with a row in the batch of step SPIKE that is nothing like the others.

    ``store/`` has such rows, too, as a first source of 3/4 of the rows, and others as a second one.
    """
    import sft_runs
    from tiny_models import make_tiny_model

    sft_runs.make_inputs(folder)
    rows = sft_runs.write_rows(folder / "train.jsonl", 2 * STEPS).read_text().splitlines(keepends=True)
    odd = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ZQXJKVWYZQXJKVWY"}]}
    rows.insert(2 * SPIKE - 2, json.dumps(odd) + "\n")
    (folder / "train.jsonl").write_text("".join(rows))
    rated = [json.dumps(json.loads(row) | {"reward": i % 4}) + "\n" for i, row in enumerate(rows)]
    (folder / "rated.jsonl").write_text("".join(rated))
    for name, numbers in (("pairs", range(30)), ("pairs_eval", range(30, 36))):
        lines = [{"prompt": f"{i} good", "chosen": "yes " * (1 + i % 3), "rejected": f"no {i}"} for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        labels = [
            (line["prompt"], *answer) for line in lines for answer in ((line["chosen"], 1), (line["rejected"], 0))
        ]
        keys = "prompt", "completion", "label"
        lines = [json.dumps(dict(zip(keys, values, strict=True))) + "\n" for values in labels]
        (folder / f"{name.replace('pairs', 'answers')}.jsonl").write_text("".join(lines))
    make_tiny_model(folder / "teacher", "qwen3", seed=1, vocab_size=330, num_hidden_layers=2)
    (folder / "store").mkdir()
    rows.insert(3 * SPIKE // 2 - 2, rows.pop(2 * SPIKE - 2))
    others = sft_runs.write_rows(folder / "second.jsonl", STEPS, first=200).read_text().splitlines(keepends=True)
    for name, lines in (("first", rows), ("second", others)):
        for i in range(0, len(lines), FILE_ROWS):
            (folder / "store" / f"{name}-{i:03}.jsonl").write_text("".join(lines[i : i + FILE_ROWS]))


def run(values: dict, workdir: pathlib.Path, plan: dict | None, counts: pathlib.Path | None = None) -> None:
    """One start of a training run, to be forked."""
    instants = Instants(workdir, plan)
    importlib.import_module("postrain.recipes").train(values, workdir)
    if counts:
        counts.write_text(json.dumps(instants.counts))


def run_one_of(processes: int, values: dict, workdir: pathlib.Path, plan, counts, index: int, port: int) -> None:
    """``run`` as process ``index`` of several, as the command line starts them; the plan names the one to be killed."""
    import jax

    from postrain import cli
    from postrain.cluster.discover import find_cluster
    from postrain.cluster.processes import join

    jax.config.update("jax_num_cpu_devices", DEVICES)
    own = counts.with_name(f"{counts.name}.{index}") if counts else None
    with join(find_cluster(f"127.0.0.1:{port}", processes, index), cli.explain):
        run(values, workdir, plan if plan and plan["process"] == index else None, own)


def describe(workdir: pathlib.Path, output: pathlib.Path) -> None:
    """Writes what a finished run left, by name, as hashes of bytes; to be forked."""
    import jax
    from orbax.checkpoint import v1 as ocp

    from postrain.checkpoint.integrity import verify_checksums

    found = {"files": sorted(path.name for path in workdir.iterdir())}
    steps = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    found["checkpoints"] = steps
    newest = workdir / "checkpoints" / steps[-1]
    for step in steps:
        verify_checksums(workdir / "checkpoints" / step)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not those that it was saved from
    saved = ocp.checkpointables_metadata(newest).metadata["state"]
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
    state = ocp.load_checkpointables(newest, {"state": abstract})["state"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[f"state{jax.tree_util.keystr(path)}"] = (
            f"{leaf.dtype}{leaf.shape} {digest(jax.device_get(leaf).tobytes())}"
        )
    told = json.loads((newest / "run" / "data.json").read_text())
    found["run"] = {key: told[key] for key in ("data_position", "config", "data_fingerprint", "model_fingerprint")}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    for name in {"samples.jsonl", "config.json", "calibration.json"} & set(found["files"]):
        found[name] = digest((workdir / name).read_bytes())
    for path in sorted([*(workdir / "export").iterdir(), *(workdir / "reference").glob("*")]):
        found[f"{path.parent.name}/{path.name}"] = digest(path.read_bytes())
    output.write_text(json.dumps(found))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def warm_up(way: str = "1") -> None:
    """Imports everything that a run imports; starts nothing."""
    if way == "streamed":
        importlib.import_module("store").import_s3()
    importlib.import_module("postrain.recipes.sft")
    importlib.import_module("postrain.recipes.preference")
    importlib.import_module("postrain.recipes.reward")
    importlib.import_module("postrain.recipes.distill")
    for module, _ in CALLS.values():
        importlib.import_module(module)
    importlib.import_module("tensorboardX")
    importlib.import_module("jax.experimental.multihost_utils")


class Trial:
    """A workdir whose run is killed again and again, until it has come to its end."""

    def __init__(self, folder: pathlib.Path, values: dict, way: str = "1"):
        self.folder, self.values, self.processes = folder, values, 2 if way == "2" else 1
        self.log, self.outlived = folder.parent / f"{folder.name}.log", 0.0

    def start(self, plan: dict | None, counts: pathlib.Path | None = None) -> int:
        with self.log.open("a") as log:
            log.write(f"\n--- {plan}\n")
        if self.processes == 1:
            return fork(lambda: run(self.values, self.folder, plan, counts), self.log)
        work = functools.partial(run_one_of, self.processes, self.values, self.folder, plan, counts)
        status, seconds = fork_all(work, self.log, self.processes)
        self.outlived = max(self.outlived, seconds)
        return status

    def describe(self) -> dict:
        output = self.folder.parent / "found.json"
        if fork(functools.partial(describe, self.folder, output), self.log):
            raise SystemExit(f"{self.folder} cannot be read:\n{self.log.read_text()}")
        return json.loads(output.read_text())


def draw_plan(draw: random.Random, counts: list[dict[str, int]]) -> dict:
    """``counts``: how often each process passes each kind of instant."""
    process = draw.randrange(len(counts))
    kinds = counts[process]
    kind = draw.choice(sorted(kinds))
    later = draw.choice((0.0, draw.uniform(0, LATER)))
    return {"kind": kind, "number": draw.randint(1, kinds[kind]), "later": later, "process": process}


def compare(found: dict, expected: dict, where: str) -> None:
    wrong = [key for key in sorted(found.keys() | expected.keys()) if found.get(key) != expected.get(key)]
    if wrong:
        shown = "\n".join(f"  {key}: {found.get(key)}\n  expected {expected.get(key)}" for key in wrong[:4])
        raise SystemExit(f"{where} differs from a run that was not killed:\n{shown}")


def make_reference(folder: pathlib.Path, way: str = "1") -> tuple[dict, list[dict[str, int]], dict]:
    """Config values of a run, how often each process passes each kind of instant, what it leaves undisturbed."""
    inputs, output, counts = folder / "inputs", folder / "values.json", folder / "counts.json"
    inputs.mkdir()
    fork(lambda: make_inputs(inputs), folder / "inputs.log")
    fork(lambda: output.write_text(json.dumps(make_values(inputs, way))), folder / "inputs.log")
    with open_store(inputs / "store", way):
        reference = Trial(folder / "reference", json.loads(output.read_text()), way)
        if reference.start(None, counts):
            raise SystemExit(reference.log.read_text())
    expected = reference.describe()
    skipped = [line.get("train/skipped") for line in expected["metrics"]]
    if way in ("1", "streamed") and not (skipped[0] == 0.0 and skipped[-1] >= 1.0 and len(skipped) == STEPS):
        raise SystemExit(f"the run skipped no step:\n{reference.log.read_text()}")
    passed = [json.loads(path.read_text()) for path in sorted(folder.glob("counts.json*"))]
    return reference.values, passed, expected


@contextlib.contextmanager
def open_store(folder: pathlib.Path, way: str) -> Iterator[None]:
    """The object store of a streamed run, which is not killed."""
    if way != "streamed":
        yield
        return
    store = importlib.import_module("store").Store(folder)
    try:
        yield
    finally:
        store.kill()


def measure(kills: int, seed: int, folder: pathlib.Path, way: str = "1") -> dict:
    """Kills runs ``kills`` times; raises SystemExit at the first that does not end in the bytes of an unkilled one."""
    warm_up(way)
    draw = random.Random(seed)
    values, kinds, expected = make_reference(folder, way)
    started, done, hit, trials, outlived = time.monotonic(), 0, collections.Counter(), 0, 0.0
    with open_store(folder / "inputs" / "store", way):
        while done < kills:
            trial = Trial(folder / f"run{trials}", values, way)
            trials += 1
            for _ in range(draw.randint(1, 12)):  # kills of this run, as long as it lasts
                plan = draw_plan(draw, kinds)
                status = trial.start(plan)
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                    done, _ = done + 1, hit.update([plan["kind"]])
                elif status == 0:
                    break
                else:
                    raise SystemExit(f"seed {seed}, {trial.folder.name}: failed:\n{trial.log.read_text()}")
                if done == kills:
                    break
            if trial.start(None):
                raise SystemExit(f"seed {seed}, {trial.folder.name}: did not finish:\n{trial.log.read_text()}")
            compare(trial.describe(), expected, f"seed {seed}, {trial.folder.name} ({trial.log})")
            shutil.rmtree(trial.folder)
            outlived = max(outlived, trial.outlived)
            each = (time.monotonic() - started) / max(done, 1)
            print(f"{done} kills, {trials} runs, {each:.2f} s a kill", flush=True)
    return {
        "kills": done,
        "runs": trials,
        "kinds": len(set().union(*kinds)),
        "seconds": time.monotonic() - started,
        "outlived": outlived,
        "seeds": [seed],
        "hit": hit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    how = parser.add_argument_group("the runs, of one or more kinds")
    how.add_argument("--processes", choices="12", default="1", help=f"2: of a run, with {DEVICES} devices each")
    how.add_argument("--streamed", action="store_true", help="runs whose data are streamed from an object store")
    how.add_argument("--preference", action="store_true", help="runs of recipe preference, of every parameter")
    how.add_argument("--kto", action="store_true", help="the same with single answers")
    how.add_argument("--reward", action="store_true", help="runs of recipe reward, of adapters and a head")
    how.add_argument("--head", action="store_true", help="runs of rated answers, with a head that expects the ratings")
    how.add_argument("--distill", action="store_true", help="runs of recipe distill, with a teacher beside the student")
    parser.add_argument("--write", action="store_true", help=f"add the figures to those in {PAGE.name}")
    arguments = parser.parse_args()
    ways = [way for way in ("streamed", "preference", "kto", "reward", "head", "distill") if getattr(arguments, way)]
    if ways and arguments.processes != "1":
        parser.error(f"--processes={arguments.processes} is a kind of run by itself: leave out --{' --'.join(ways)}")
    ways, found = ways or [arguments.processes], {}
    if arguments.kills < len(ways):
        parser.error(f"--kills={arguments.kills}: expected at least {len(ways)}, one for each kind of run")
    for i, way in enumerate(ways):
        kills = arguments.kills * (i + 1) // len(ways) - arguments.kills * i // len(ways)
        with tempfile.TemporaryDirectory(prefix="kills") as folder:
            found[way] = measure(kills, arguments.seed, pathlib.Path(folder), way)
        if arguments.write:
            importlib.import_module("kill_figures").write(PAGE, way, found[way])
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
