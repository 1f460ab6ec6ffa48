"""`postrain plan`: a tiny model's real train step compiled for a TPU slice, an H100 node and eight CPU devices.

Each command runs in a process of its own, as a user's does: compilers and CPU devices are set up once in a process.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from postrain.plan import report as plan_report

ROOT = pathlib.Path(__file__).resolve().parents[2]
D, F, L, V, HEADS, KV_HEADS, H = 128, 256, 3, 512, 4, 2, 32
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": H,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MATRICES = L * (2 * D * HEADS * H + 2 * D * KV_HEADS * H + 3 * D * F)  # of the layers
NORMS = (2 * L + 1) * D
ROWS, LENGTH = 16, 256
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder that holds config.json alone."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    write_model(folder)
    return folder


def write_model(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL | changes))
    return folder


def plan_words(folder, target, *words, rows=ROWS, length=LENGTH):
    values = {"model.path": folder, "data.sequence_length": length, "data.batch_size": rows}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    return ["plan", "--config=configs/sft.py:full", f"--target={target}", *overrides, *words]


def run_plan(*words, **kwargs):
    command = [sys.executable, "-m", "postrain.cli", *plan_words(*words, **kwargs)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


def report_of(*words, code=0, **kwargs):
    result = run_plan(*words, "--json", **kwargs)
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def cpu(folder):
    return report_of(folder, "cpu:8", "--config.model.remat=none", "--config.mesh.tensor=2")


@pytest.fixture(scope="module")
def tpu(folder):
    return report_of(folder, "v5e:2x2", "--config.train.micro_batches=2", "--config.model.remat=full")


@pytest.fixture(scope="module")
def gpu(folder):
    return report_of(folder, "h100:1x8", "--config.train.micro_batches=2", "--config.optimizer.ema_decay=0.9")


def check_memory(report, devices, row_shards, slots=2):
    """What each device holds, worked out by hand: matrices and embedding in parts, norms whole; float32."""
    memory = dict(report["memory"])
    total = memory.pop("total")
    assert sum(memory.values()) == total > 0
    assert min(memory.values()) >= 0
    params = 4 * ((MATRICES + V * D) // devices + NORMS)
    assert memory["parameters_trained"] == memory["gradients"] == params
    assert memory["parameters_frozen"] == 0
    counters = 4 + 4 + 4 + 8  # steps of Adam, of the schedule, of the run; the key
    counters += 2 * 64 * 4 + 3 * 4  # losses and gradient norms of the last steps, by which a spike is told
    assert memory["optimizer"] == slots * params + counters
    assert memory["batch"] == 5 * 4 * ROWS * LENGTH // row_shards
    assert report["fits"] is True and report["compiled"] is True and report["advice"] == []
    return memory


def test_cpu_memory_is_the_arithmetic_of_shapes(cpu):
    memory = check_memory(cpu, 8, 4)
    assert (memory["padding"], memory["program"], memory["average"]) == (0, 0, 0)
    assert cpu["mesh"] == {"fsdp": 4, "tensor": 2} and cpu["model"]["compute_dtype"] == "float32"
    assert cpu["target"]["devices"] == 8 and cpu["bound"] is None and cpu["target"]["peak_flops"] is None


def test_tpu_memory_adds_padding_and_the_program(tpu):
    memory = check_memory(tpu, 4, 4)
    assert memory["padding"] > 0 and memory["program"] > 0, "tiles of 8 x 128, and code in device memory"
    assert tpu["model"]["compute_dtype"] == "bfloat16", "by the target, not by the machine that compiles"
    assert tpu["target"]["kind"] == "TPU v5 lite" and tpu["target"]["usable_bytes"] == 15.75 * GIB


def test_gpu_memory_holds_the_moving_average(gpu):
    memory = check_memory(gpu, 8, 8)
    assert memory["padding"] == 0 and memory["average"] == memory["parameters_trained"]
    assert gpu["target"]["kind"] == "NVIDIA H100 80GB HBM3"
    assert gpu["target"]["usable_bytes"] == int(0.75 * gpu["target"]["memory"])


def test_flops_are_the_formula_and_what_is_recomputed(cpu, tpu, gpu):
    tokens, pairs = ROWS * LENGTH, ROWS * LENGTH * (LENGTH + 1) // 2
    linear, attention, unembedding = 6 * MATRICES * tokens, 12 * L * HEADS * H * pairs, 6 * D * V * tokens
    for report in (cpu, tpu, gpu):
        kinds = report["flops"]["model_by_kind"]
        assert kinds == {"linear": linear, "adapters": 0, "attention": attention, "unembedding": unembedding}
        assert report["flops"]["model"] == linear + attention + unembedding
    assert cpu["flops"]["executed"] == cpu["flops"]["model"]
    again = 2 * (MATRICES - L * D * F) * tokens
    assert tpu["flops"]["executed"] - tpu["flops"]["model"] == again, "forward but for each layer's last product"
    assert cpu["flops"]["compiler"] > 0 and tpu["flops"]["compiler"] > 0 and gpu["flops"]["compiler"] is None


def test_collectives_gather_every_matrix_for_each_pass(tpu, gpu):
    """FSDP by hand: bfloat16 matrices gathered in forward and in backward of each micro-batch, gradients scattered."""
    moved = 2 * MATRICES * 2  # bytes in bfloat16, of two micro-batches
    embedding = 2 * V * D * 2
    gathered = gpu["collectives"]["all-gather"]
    assert gathered["payload_bytes"] == 2 * moved + embedding * 2, "matrices twice; the table in float32 for both ends"
    scattered = gpu["collectives"]["reduce-scatter"]["payload_bytes"]
    assert scattered == moved + 2 * embedding, "gradients of matrices in bfloat16, of the table in float32"
    for report, devices in ((gpu, 8), (tpu, 4)):
        for kind, count in report["collectives"].items():
            passes = 2 if kind == "all-reduce" else 1
            assert count["received_bytes"] == pytest.approx(
                passes * count["payload_bytes"] * (devices - 1) / devices, abs=99
            )
        assert report["uncounted_collectives"] == 0
    kinds = ("all-gather", "reduce-scatter", "all-reduce")
    assert sum(tpu["collectives"].get(kind, {"payload_bytes": 0})["payload_bytes"] for kind in kinds) > 3 * moved


def test_bound_is_the_longest_of_three_times(tpu, gpu):
    for report, peak, devices in ((tpu, 197e12, 4), (gpu, 989e12, 8)):
        bound, target = report["bound"], report["target"]
        assert target["peak_flops"] == peak
        seconds = bound["seconds"]
        assert seconds["compute"] == pytest.approx(report["flops"]["executed"] / peak / devices)
        received = sum(count["received_bytes"] for count in report["collectives"].values())
        assert seconds["interconnect"] == pytest.approx(received / target["link_bandwidth"], rel=1e-3)
        assert seconds["memory"] == pytest.approx(bound["memory_bytes_moved"] / target["memory_bandwidth"])
        assert bound["step_seconds"] == max(seconds.values()) == seconds[bound["limited_by"]]
        assert bound["mfu"] == pytest.approx(report["flops"]["model"] / (bound["step_seconds"] * peak * devices))
        assert 0 < bound["mfu"] <= 1
        assert bound["tokens_per_second"] == pytest.approx(ROWS * LENGTH / bound["step_seconds"])


SCHEMA = {
    "target": {"name", "devices", "hosts", "kind", "usable_bytes", "usable_why", "peak_flops", "memory"}
    | {"memory_bandwidth", "link_bandwidth", "network_bandwidth", "source"},
    "model": {"parameters_trained", "parameters_frozen", "compute_dtype", "remat"},
    "batch": {"rows", "sequence_length", "micro_batches", "tokens"},
    "memory": {"parameters_trained", "parameters_frozen", "optimizer", "average", "batch", "gradients"}
    | {"activations", "outputs", "padding", "program", "total"},
    "flops": {"model", "model_by_kind", "executed", "compiler"},
    "bound": {"seconds", "memory_bytes_moved", "network_seconds", "step_seconds", "limited_by", "mfu"}
    | {"tokens_per_second"},
}
FIELDS = {"mesh", "fits", "compiled", "collectives", "uncounted_collectives", "advice", "notes", "compile_seconds"}


def test_json_has_one_schema_on_every_target(cpu, tpu, gpu):
    for report in (cpu, tpu, gpu):
        assert set(report) == set(SCHEMA) | FIELDS
        for section, keys in SCHEMA.items():
            if report[section] is not None:
                assert set(report[section]) == keys, section
        for count in report["collectives"].values():
            assert set(count) == {"times", "payload_bytes", "received_bytes"}
        assert all(type(size) is int for size in report["memory"].values())


def test_what_cannot_fit_by_its_shapes_is_told_with_a_number(tmp_path):
    """280 billion parameters on four chips, too many even in 4 bits: nothing but more chips is advised."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 400, "num_attention_heads": 64}
    folder = write_model(tmp_path / "large", **sizes, head_dim=128)
    result = run_plan(folder, "v5e:2x2", "--config.train.micro_batches=4", "--config.model.remat=full", length=256)
    assert result.returncode == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: does not fit on v5e:2x2: a device needs ") and last.endswith(" GiB too much")
    needed = float(last.split("needs ")[1].split(" GiB")[0].replace(",", ""))
    layers = 400 * (2 * 8192 * 8192 + 2 * 8192 * 256 + 3 * 8192 * 28672)
    assert needed > 16 * layers / 4 / GIB, "parameters, two moments and gradients in float32"
    assert "model.lora.rank=16: cannot fit, inputs and gradients alone take" in result.stdout
    assert "nothing tried fits: use more devices (about " in result.stdout


def test_the_advice_is_compiled(tmp_path):
    """Wide activations of 2 million tokens: the compiler refuses, then says what smaller micro-batches need.

    4,093 rows of a device, a prime, leave one number of micro-batches: a small program, soon compiled.
    """
    folder = write_model(tmp_path / "wide", intermediate_size=8192, num_hidden_layers=1)
    result = run_plan(folder, "v5e:2x2", "--config.model.remat=none", rows=4 * 4093, length=128)
    assert result.returncode == 1, result.stderr
    assert "fits        NO: a device needs " in result.stdout and "; the compiler refuses it" in result.stdout
    [line] = [line.strip() for line in result.stdout.splitlines() if "train.micro_batches=" in line]
    words, size = line.split(": fits, ")
    assert 10 < float(size.removesuffix(" MiB")) < 1000
    assert words == "train.micro_batches=4093" and result.stderr.splitlines()[-1].endswith(f"; fits with {words}")


def as_report(facts: dict) -> plan_report.PlanReport:
    """The report that ``to_dict`` made ``facts`` of."""
    memory = {kind: size for kind, size in facts["memory"].items() if kind != "total"}
    collectives = {kind: plan_report.CollectiveFacts(**counts) for kind, counts in facts["collectives"].items()}
    typed = {
        "target": plan_report.TargetFacts(**facts["target"]),
        "model": plan_report.ModelFacts(**facts["model"]),
        "batch": plan_report.BatchSizes(**facts["batch"]),
        "memory": plan_report.Memory(**memory),
        "flops": plan_report.Flops(**facts["flops"]),
        "collectives": collectives,
        "bound": plan_report.Bound(**facts["bound"]) if facts["bound"] else None,
    }
    return plan_report.PlanReport(**facts | typed)


def test_text_shows_every_figure(cpu, tpu, gpu):
    for facts, word in ((cpu, "nothing is published"), (tpu, "padding of layouts"), (gpu, "moving average")):
        report = as_report(facts)
        assert report.to_dict() == facts
        text, target = str(report), facts["target"]
        assert text.startswith(f"target      {target['name']}: {target['devices']} x {target['kind']}, mesh fsdp=")
        labels = ("parameters, trained", "optimizer state", "gradients", "activations, temporaries", "  total ", word)
        for label in (*labels, "fits        yes, ", "FLOPs       ", "all-gather", "MFU  "):
            assert label in text, label
        assert plan_report.format_bytes(facts["memory"]["total"]) in text
        assert ("%" in text.rpartition("MFU")[2]) == (facts is not cpu)


BAD_INPUT = [
    ("v5p:3x5x7", (), "--target=v5p:3x5x7: there is no such slice: Topology layout"),
    (
        "cpu:8",
        ("--config.mesh.tensor=3",),
        "mesh: tensor=3 does not divide into 8 devices: set sizes whose product divides it (mesh.fsdp = -1",
    ),
    ("cpu:8", ("--config.mesh.tensor=8",), "config key 'mesh.tensor' = 8: 4 heads over 2 key heads do not divide"),
    ("cpu:8", ("--config.data.batch_size=12",), "config key 'data.batch_size' = 12 must be a multiple of mesh.data x"),
    ("cpu:8", ("--config.train.micro_batches=4",), "data.batch_size=16 is not a multiple of train.micro_batches=4"),
    ("cpu:8", ("--config.model.path=nowhere",), "'nowhere'"),
    ("cpu:9", (), "--target=cpu:9: JAX has already started with 8 CPU devices"),
]
RUN_ALL = "import json, sys; from postrain.cli import main; print([main(words) for words in json.loads(sys.argv[1])])"


def test_bad_input_is_one_line(folder):
    commands = [plan_words(folder, target, *words) for target, words, _ in BAD_INPUT]
    command = [sys.executable, "-c", RUN_ALL, json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert result.stdout == f"{[2] * len(BAD_INPUT)}\n", result.stderr
    for line, (_, _, message) in zip(result.stderr.splitlines(), BAD_INPUT, strict=True):
        assert line.startswith("error: ") and message in line, line
