"""What is tried when a step does not fit: the order, where it stops, what is not compiled."""

import types

import pytest

from postrain.config import resolve
from postrain.plan.plan import advise, list_changes, list_micro_batches, replace_keys
from postrain.plan.report import Attempt, BatchSizes, Flops, Memory, ModelFacts, PlanReport, TargetFacts
from postrain.plan.targets import CHIPS

GIB = 2**30
MEMORY = Memory(10 * GIB, 0, 0, 0, 0, 0, activations=40 * GIB)
NOTHING_PUBLISHED = dict.fromkeys(
    ("peak_flops", "memory", "memory_bandwidth", "link_bandwidth", "network_bandwidth", "source")
)


def make_report(advice: list[Attempt]) -> PlanReport:
    """A step of 50 GiB that eight devices of 16 GiB cannot take."""
    return PlanReport(
        target=TargetFacts("cpu:8", 8, 1, "cpu", 16 * GIB, "a part of this machine", **NOTHING_PUBLISHED),
        mesh={"data": 2, "fsdp": 4},
        model=ModelFacts(1000, 0, "float32", "none"),
        batch=BatchSizes(8, 128, 1, 1024),
        memory=MEMORY,
        fits=False,
        compiled=True,
        flops=Flops(4e9, {"linear": 3e9, "attention": 1e9, "adapters": 0.0}, 5e9, None),
        collectives={},
        uncounted_collectives=0,
        bound=None,
        advice=advice,
        notes=["mesh.tensor leaves this whole"],
        compile_seconds=1.7,
    )


def advice_lines(advice: list[Attempt]) -> list[str]:
    """The lines of the report between "fits" and "FLOPs"."""
    text = str(make_report(advice)).partition("fits  ")[2].partition("\nFLOPs")[0]
    return [line.strip() for line in text.splitlines()[1:]]


def make_step(data=1, rank=0, size=64, fp8=False, **train):
    model = {"path": "m", "fp8": fp8, "lora": {"rank": rank}}
    values = {"data": {"train": "t", "batch_size": 64, "sequence_length": 1024}, "model": model}
    config = resolve(values | {"mesh": {"data": data}, "train": train})
    mesh = types.SimpleNamespace(shape={"data": data, "fsdp": 8 // data, "expert": 1})
    abstract = types.SimpleNamespace(config=types.SimpleNamespace(embed_size=size))
    return types.SimpleNamespace(config=config, mesh=mesh, model=abstract)


def make_target(chip, usable):
    return types.SimpleNamespace(chip=CHIPS.get(chip), usable=usable)


def try_out(step, target, sizes):
    """The advice where each change in turn needs one of ``sizes``, and the configs that were weighed."""
    weighed = []

    def weigh(config):
        weighed.append(config)
        return sizes[len(weighed) - 1] * GIB, sizes[len(weighed) - 1] < 100

    return advise(step, MEMORY, target, weigh), weighed


def test_each_change_keeps_the_ones_before_and_the_first_that_fits_ends_it(capsys):
    advice, weighed = try_out(make_step(data=2), make_target("v5e", 16 * GIB), [120, 17, 16.5, 15])
    changes = [one.change for one in advice]
    assert changes == [
        {"mesh.data": 1, "mesh.fsdp": -1},
        {"mesh.data": 1, "mesh.fsdp": -1, "train.micro_batches": 8},
        {"mesh.data": 1, "mesh.fsdp": -1, "train.micro_batches": 8, "model.remat": "full"},
        {"mesh.data": 1, "mesh.fsdp": -1, "train.micro_batches": 8, "model.remat": "full", "model.lora.rank": 16},
    ]
    assert [one.fits for one in advice] == [False, False, False, True]
    last = weighed[-1]
    assert (last.mesh.data, last.mesh.fsdp, last.train.micro_batches) == (1, -1, 8)
    assert (last.model.remat, last.model.lora.rank, last.data.sequence_length) == ("full", 16, 1024)
    lines = advice_lines(advice)
    assert lines[0].endswith(": cannot fit, inputs and gradients alone take 120.00 GiB")
    assert lines[1].endswith(": does not fit, 17.00 GiB") and lines[3].endswith(": fits, 15.00 GiB") and len(lines) == 4
    assert capsys.readouterr().err.count("does not fit, trying ") == 4


def test_shorter_rows_come_last_and_then_more_devices():
    advice, _ = try_out(make_step(rank=4), make_target("v5e", 16 * GIB), [40, 30, 27, 25, 20])
    assert [one.change.get("data.sequence_length") for one in advice] == [None, None, None, 512, 256]
    assert [one.change.get("model.quantization") for one in advice] == [None, None, "nf4", "nf4", "nf4"]
    assert all("model.lora.rank" not in one.change for one in advice), "it has adapters already"
    assert advice_lines(advice)[-1] == (
        "nothing tried fits: use more devices (about 10 of these) or devices with more memory"
    )


def test_memory_that_jax_leaves_free_is_the_first_advice():
    target = make_target("h100", int(0.75 * CHIPS["h100"].memory))
    memory = Memory(0, 0, 0, 0, 0, 0, activations=int(0.9 * CHIPS["h100"].memory))
    [attempt] = advise(make_step(), memory, target, lambda config: pytest.fail("nothing has to be compiled again"))
    assert attempt.change == {"environment XLA_CLIENT_MEM_FRACTION": 0.95} and attempt.fits


@pytest.mark.parametrize(
    ("now", "rows", "usable", "expected"),
    [
        (1, 64, 30, [4, 64]),  # 40 of activations into 20, a fifth more to be sure: 2.4
        (2, 64, 30, [8, 64]),
        (1, 64, 11, [64]),  # 48 of 64 rows' share
        (1, 64, 9, [64]),  # no room: what can be tried
        (1, 7, 30, [7]),
        (64, 64, 30, []),
    ],
)
def test_micro_batches_are_chosen_by_proportion(now, rows, usable, expected):
    assert list_micro_batches(now, rows, MEMORY, usable * GIB) == expected


def test_keys_are_replaced_in_a_frozen_config():
    config = make_step().config
    changed = replace_keys(config, {"model.lora.rank": 8, "train.micro_batches": 2})
    assert (changed.model.lora.rank, changed.train.micro_batches) == (8, 2)
    assert config.model.lora.rank == 0 and changed.data == config.data


def test_nf4_is_proposed_only_where_a_run_takes_it():
    proposed = lambda **words: [list(change)[-1] for change, _ in list_changes(make_step(**words), MEMORY, GIB)]
    assert "model.quantization" in proposed() and "model.quantization" in proposed(rank=4)
    assert "model.quantization" not in proposed(size=63) + proposed(fp8=True)


def test_the_text_is_the_report_line_by_line():
    tried = Attempt({"model.remat": "full", "train.micro_batches": 4}, 15 * GIB, compiled=True, fits=True)
    report = make_report([tried])
    assert str(report).splitlines() == [
        "target      cpu:8: 8 x cpu, mesh data=2 x fsdp=4",
        "            mesh.tensor leaves this whole",
        "model       1,000 parameters trained, 0 frozen, float32, remat none",
        "batch       8 rows x 128 tokens = 1,024 a step, in 1 micro-batch",
        "compiled    in 2 s",
        "memory      of each device",
        "  parameters, trained          10.00 GiB",
        "  activations, temporaries     40.00 GiB",
        "  total                        50.00 GiB",
        "fits        NO: a device needs 50.00 GiB of 16.00 GiB, 34.00 GiB too much (a part of this machine)",
        "            model.remat=full, train.micro_batches=4: fits, 15.00 GiB",
        "FLOPs       4G a step by the formula of perf/mfu: linear 75%, attention 25%",
        "            5G carried out at least, recomputation included",
        "            of full rows with one document each; shorter documents need fewer",
        "collectives none",
        "MFU         no bound: nothing is published about this CPU",
    ]
    assert report.format_misfit() == (
        "does not fit on cpu:8: a device needs 50.00 GiB of 16.00 GiB, 34.00 GiB too much; fits with model.remat=full, "
        "train.micro_batches=4"
    )
    assert report.to_dict()["memory"]["total"] == 50 * GIB and report.to_dict()["advice"][0]["needed"] == 15 * GIB
