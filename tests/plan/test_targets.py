"""Targets by name, what is refused before a compiler is asked, and the table of chips."""

import importlib.util

import jax
import pytest

from postrain.errors import UserError
from postrain.plan.plan import explain_compiler, read_refusal
from postrain.plan.targets import CHIPS, gpu_memory_fraction, open_target
from postrain.training.throughput import PEAK_FLOPS, simplify_kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h999:1x8", "--target=h999:1x8: expected one of v5e, v5p, v6e, h100, h200 or cpu, as in v5e:4x4"),
        ("v5e", "--target=v5e: expected CHIP:SHAPE, as in v5e:4x4"),
        ("v5e:4by4", "--target=v5e:4by4: expected CHIP:SHAPE"),
        ("v5e:3x5", "--target=v5e:3x5: there is no such slice; expected one of 1x1, 2x2, 2x4, 4x4"),
        ("v5e:2x2x2", "--target=v5e:2x2x2: there is no such slice"),
        ("h100:8", "--target=h100:8: expected NODESxGPUS with at most 8 GPUs a node"),
        ("h100:1x16", "--target=h100:1x16: expected NODESxGPUS with at most 8 GPUs a node"),
        ("cpu:2x4", "--target=cpu:2x4: expected cpu:NUMBER"),
        ("cpu:0", "--target=cpu:0: every size must be at least 1"),
        ("cpu:1000", "--target=cpu:1000: JAX has already started with"),
        ("cpu:100000", "--target=cpu:100000: 100,000 devices, expected at most 1,024"),
        ("h100:99999x8", "--target=h100:99999x8: 799,992 devices, expected at most 8,192"),
        ("v5p:999x999x999", "--target=v5p:999x999x999: 997,002,999 devices, expected at most 8,960"),
    ],
)
def test_a_wrong_target_is_refused_by_name(name, message):
    jax.devices()  # a process that has started has the devices that it has
    with pytest.raises(UserError) as caught:
        open_target(name)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "what"), [("v5e:4x4", "TPU"), ("h100:1x8", "GPU")])
def test_a_missing_compiler_names_the_extra(name, what, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError) as caught:
        open_target(name)
    expected = f"--target={name}: the {what} compiler is not installed: pip install -e '.[plan]' (Linux)"
    assert str(caught.value) == expected
    assert ".[plan]" in explain_compiler("UNAVAILABLE: No PTX compilation provider is available. Neither ...")
    assert ".[plan]" in explain_compiler("INTERNAL: libdevice not found at ./libdevice.10.bc")


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.81G) "
            "exceeds available HBM (15.75G).",
            28.81,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 215.17G of 31.25G hbm. Exceeded hbm capacity by 183.92G.",
            215.17,
        ),
        ("Ran out of memory in memory space hbm. Used 0.50T of 31.25G hbm.", 512),
    ],
)
def test_a_refusal_for_memory_says_how_much(message, gib):
    assert read_refusal(message) == int(gib * 2**30)


def test_another_failure_is_no_refusal():
    assert read_refusal("INTERNAL: Mosaic failed to compile TPU kernel: Used registers") is None
    assert explain_compiler("INTERNAL: a\n  b") == "the compiler could not compile the step: INTERNAL: a b"


def test_every_chip_has_its_figures():
    for name, chip in CHIPS.items():
        assert simplify_kind(chip.kind) in PEAK_FLOPS, name
        assert 1e11 < chip.link_bandwidth < chip.memory_bandwidth < 1e13
        assert 15 * 2**30 < chip.memory < 200 * 2**30
        assert bool(chip.node_size) == bool(chip.network_bandwidth) == (chip.platform == "gpu")


def test_the_share_of_a_gpu_is_what_jax_takes(monkeypatch):
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)
    assert gpu_memory_fraction()[0] == 0.75
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".9")
    assert gpu_memory_fraction() == (0.9, "by XLA_CLIENT_MEM_FRACTION=.9")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "much")
    with pytest.raises(UserError, match="XLA_CLIENT_MEM_FRACTION: expected a number, found 'much'"):
        gpu_memory_fraction()
