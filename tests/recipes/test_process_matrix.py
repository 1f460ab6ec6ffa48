"""Everything that a run can do, in two processes of two devices: the bytes of one process with four devices.

The cases cover every pair of values of FACTORS that can occur together. Those that CI runs are marked in CASES; the
others are slow tests. A case that is resumed loses its last checkpoint and its export and is started again.
"""

import itertools
import os
import shutil
import subprocess
import sys
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from sft_runs import WORDS, make_inputs, make_values, read_folder, read_lines, without_perf, write_config, write_rows
from tiny_models import make_tiny_model

from postrain.cluster.launch import find_ports

FACTORS = {
    "tuning": ("full", "lora", "dora", "nf4", "int8", "rows", "rows and lora"),  # rows: of new tokens
    "dtype": ("float32", "bfloat16"),  # of the model's files
    "export": ("merged", "adapter"),
    "data": ("in memory", "mixed", "streamed"),
    "mesh": ("fsdp", "tensor", "expert"),  # the axis that spans both processes; expert: of a mixture of experts
    "generates": (False, True),
    "ema": (False, True),
    "keep_best": (False, True),
    "resumed": (False, True),
}


class Case(NamedTuple):
    """A value of each factor."""

    tuning: str
    dtype: str
    export: str
    data: str
    mesh: str
    options: str  # the last four of FACTORS that are true
    in_ci: bool = False

    def value_of(self, factor):
        return getattr(self, factor) if factor in self._fields else factor in self.options.split()


CASES = (
    Case("full", "bfloat16", "merged", "in memory", "tensor", "generates", in_ci=True),
    Case("dora", "bfloat16", "merged", "mixed", "fsdp", "generates ema", in_ci=True),
    Case("int8", "float32", "adapter", "streamed", "expert", "generates resumed", in_ci=True),
    Case("rows", "bfloat16", "merged", "mixed", "tensor", "ema keep_best", in_ci=True),
    Case("full", "float32", "merged", "mixed", "expert", "ema keep_best"),
    Case("full", "float32", "merged", "streamed", "fsdp", "generates keep_best resumed"),
    Case("lora", "bfloat16", "adapter", "streamed", "tensor", "ema"),
    Case("lora", "float32", "merged", "mixed", "expert", "generates keep_best resumed"),
    Case("lora", "float32", "merged", "in memory", "fsdp", "ema resumed"),
    Case("dora", "bfloat16", "merged", "streamed", "tensor", "keep_best resumed"),
    Case("dora", "float32", "adapter", "in memory", "expert", "generates ema resumed"),
    Case("nf4", "bfloat16", "adapter", "mixed", "expert", "generates keep_best resumed"),
    Case("nf4", "float32", "adapter", "streamed", "tensor", "ema resumed"),
    Case("nf4", "bfloat16", "merged", "in memory", "fsdp", "ema"),
    Case("int8", "float32", "merged", "in memory", "fsdp", "ema keep_best"),
    Case("int8", "bfloat16", "adapter", "mixed", "tensor", ""),
    Case("rows", "float32", "merged", "in memory", "fsdp", "generates resumed"),
    Case("rows", "float32", "merged", "streamed", "expert", "keep_best resumed"),
    Case("rows and lora", "bfloat16", "adapter", "in memory", "fsdp", "ema keep_best"),
    Case("rows and lora", "float32", "adapter", "mixed", "tensor", "generates resumed"),
    Case("rows and lora", "bfloat16", "merged", "streamed", "expert", "generates"),
)
NEW_TOKENS = [*WORDS, *(f"<item_{i}>" for i in range(40))]  # more than the table of 301 rows has room for

DATA = {
    "in memory": {},
    "mixed": {"mixture": {"phases": [{"step": 3, "weights": [1.0, 3.0]}]}},
    "streamed": {"streaming": True, "stream": {"shards": 4}, "packing_window": 6},
}


def test_the_cases_cover_every_pair_of_values():
    covered = {
        ((one, case.value_of(one)), (other, case.value_of(other)))
        for case in CASES
        for one, other in itertools.combinations(FACTORS, 2)
    }
    pairs = {
        pair
        for one, other in itertools.combinations(FACTORS, 2)
        for pair in itertools.product([(one, x) for x in FACTORS[one]], [(other, x) for x in FACTORS[other]])
    }
    # What trains without adapters has none to export.
    impossible = {(("tuning", tuning), ("export", "adapter")) for tuning in ("full", "rows")}
    assert covered == pairs - impossible


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("matrix"))
    write_rows(folder / "second.jsonl", 30, first=100)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    sizes = {"vocab_size": 301, "num_hidden_layers": 2}
    for dtype in FACTORS["dtype"]:
        make_tiny_model(folder / f"llama-{dtype}", "llama", **sizes, dtype=dtype)
        make_tiny_model(folder / f"moe-{dtype}", "qwen3_moe", **sizes, dtype=dtype, **experts)
    return folder


def values_of(case, inputs):
    family = "moe" if case.mesh == "expert" else "llama"
    model = {
        "path": str(inputs / f"{family}-{case.dtype}"),
        "lora": {"rank": 0 if case.tuning in ("full", "rows") else 4},
    }
    if case.tuning in ("nf4", "int8"):
        model["quantization"] = case.tuning
    if case.tuning == "dora":
        model["lora"] |= {"dora": True, "targets": ["q", "v", "o"] + (["up"] if family == "llama" else [])}
    if case.tuning.startswith("rows"):
        model["new_tokens"] = {"tokens": NEW_TOKENS, "train_alone": case.tuning == "rows"}
    sources = [
        {"path": str(inputs / name), "weight": weight} for name, weight in (("train.jsonl", 3), ("second.jsonl", 1))
    ]
    return make_values(
        inputs,
        model=model,
        data={"train": sources, "batch_size": 8} | DATA[case.data],
        optimizer={"learning_rate": 1e-3, "ema_decay": 0.5 if case.value_of("ema") else 0.0},
        mesh={"fsdp": 1, case.mesh: 4},
        train={"steps": 4},
        eval={"every": 2, "loss_rows": 4, "generate_rows": 2 if case.value_of("generates") else 0, "max_new_tokens": 4},
        # The loss falls, so that the one that is kept as the best is not the newest.
        checkpoint={"every": 2} | ({"keep": 1, "keep_best": 1, "mode": "max"} if case.value_of("keep_best") else {}),
        export={"format": case.export},
    )


def start(words, devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "postrain.cli", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags}, **pipes)


def finish(process):
    """What a run printed of its export, once it has ended well."""
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, out + error
    return [line for line in out.splitlines() if line.startswith("export ")]


def name_of(case):
    return "-".join([*case[:5], *case.options.split()]).replace(" ", "_")


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name_of(case), marks=() if case.in_ci else pytest.mark.slow) for case in CASES]
)
def test_two_processes_make_the_bytes_of_one(case, inputs, tmp_path):
    config = f"--config={write_config(tmp_path / 'c.py', values_of(case, inputs))}"
    two, one = tmp_path / "two", tmp_path / "one"
    launched = ["launch", "--target=local:2", config, f"--workdir={two}"]
    # Its collectives add up in the order in which those of several processes do.
    alone = [f"--coordinator=127.0.0.1:{find_ports()}", "--num-processes=1", "--process-id=0"]
    runs = start(launched, 2), start(["train", config, f"--workdir={one}", *alone], 4)
    notes, expected = map(finish, runs)
    assert notes == expected
    check_same(two, one)
    if case.value_of("resumed"):
        shutil.rmtree(two / "checkpoints" / "4")
        shutil.rmtree(two / "export")
        assert finish(start(launched, 2)) == expected
        check_same(two, one)
    load_with_transformers(two / "export", adapter=case.export == "adapter")


def check_same(two, one):
    lines, expected = (without_perf(read_lines(folder / "metrics.jsonl")) for folder in (two, one))
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and lines == expected
    checkpoints, others = ({path.name for path in (folder / "checkpoints").iterdir()} for folder in (two, one))
    assert checkpoints == others == {"2", "4"}
    assert (two / "samples.jsonl").exists() == (one / "samples.jsonl").exists()
    if (one / "samples.jsonl").exists():
        assert read_lines(two / "samples.jsonl") == read_lines(one / "samples.jsonl")
    assert read_folder(two / "export") == read_folder(one / "export")


def load_with_transformers(folder, *, adapter):
    loader = peft.AutoPeftModelForCausalLM if adapter else transformers.AutoModelForCausalLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1 red"}], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loader.from_pretrained(folder, attn_implementation="eager")(ids).logits
    assert torch.isfinite(logits).all()
