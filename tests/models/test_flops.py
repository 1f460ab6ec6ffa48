"""The FLOPs formula against XLA's own count of the real model's step, and what it must not count."""

import dataclasses

import jax
import numpy as np
import pytest

from postrain.models.config import LoraConfig, ModelConfig, MoeConfig
from postrain.models.flops import (
    BatchStats,
    count_batch,
    count_flops,
    format_count,
    format_formula,
)
from postrain.models.lora import init_lora
from postrain.models.params import init_params, merge_params
from postrain.objectives.sft import make_sft_loss
from postrain.training.model import Forward
from postrain.training.throughput import compute_perf, peak_flops
from postrain.types import Batch

LENGTH = 64
# One layer and one chunk of everything: XLA counts the body of a loop once, however often it runs.
CONFIG = ModelConfig(1024, 128, 384, 1, 4, 2, 32, tie_embeddings=False, attention_chunk=LENGTH)


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 1, LENGTH), dtype=np.int32)
    ones = np.ones((1, LENGTH))
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    return Batch(tokens[0], tokens[1], ones.astype(np.float32), ones.astype(np.int32), positions)


@pytest.mark.parametrize("lora", [None, LoraConfig(8), LoraConfig(64, targets=("q", "down"))])
def test_formula_agrees_with_xla(lora):
    config, batch = dataclasses.replace(CONFIG, lora=lora), make_batch()
    loss_fn = make_sft_loss(Forward(config, chunk=LENGTH).nll)
    base = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    adapters = jax.eval_shape(lambda: init_lora(config, jax.random.key(0))) if lora else None
    params, frozen = (adapters, base) if lora else (base, {})

    def step(params, frozen, batch):
        return jax.value_and_grad(lambda p: loss_fn(merge_params(p, frozen), batch, None).losses["sft"].total)(params)

    counted = jax.jit(step).lower(params, frozen, batch).cost_analysis()["flops"]
    stats = count_batch({"segment_ids": batch.segment_ids, "loss_mask": batch.loss_mask}, config)
    flops = count_flops(config, stats)
    # The one block is computed whole, masked half included, and backward computes the scores again: 7 products, not 6.
    whole_block = 2 * 7 * config.num_heads * config.head_dim * LENGTH * LENGTH
    expected = sum(flops.values()) - flops["attention"] + whole_block
    assert 1.0 <= counted / expected < 1.03, "the rest is elementwise work"


def test_packing_counts_documents_not_rows():
    segment_ids = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 4, 0, 0, 0]])
    loss_mask = np.zeros((3, 8), np.float32)
    loss_mask[0, :2] = 0.5
    stats = count_batch({"segment_ids": segment_ids, "loss_mask": loss_mask}, CONFIG)
    pairs = (6 + 3) + 36 + (1 + 1 + 1 + 3)
    assert stats == BatchStats(tokens=18, trained_tokens=2, attention_pairs=pairs)
    longest = count_batch({"segment_ids": np.ones((1, 8192), np.int32), "loss_mask": np.zeros((1, 8192))}, CONFIG)
    assert longest.attention_pairs == 8192 * 8193 // 2
    assert stats + stats == BatchStats(36, 4, 2 * pairs)


def test_a_window_s_pairs_are_those_that_are_seen():
    config = dataclasses.replace(CONFIG, num_layers=3, layer_windows=(4, 0, 100))
    segment_ids = np.array([[1] * 10 + [2] * 3 + [0] * 3, [1] * 16])
    batch = {"segment_ids": segment_ids, "loss_mask": np.zeros((2, 16))}
    seen = sum(min(t + 1, window or 16) for window in config.layer_windows for size in (10, 3, 16) for t in range(size))
    assert count_batch(batch, config).attention_pairs == seen / 3
    assert count_batch(batch, CONFIG).attention_pairs == 55 + 6 + 136


def test_frozen_weights_cost_two_thirds_and_untrained_tokens_no_projection():
    stats = BatchStats(1000, 200, 5000)
    full = count_flops(CONFIG, stats)
    lora = count_flops(dataclasses.replace(CONFIG, lora=LoraConfig(8)), stats)
    assert full["linear"] * 2 == lora["linear"] * 3 and full["adapters"] == 0 < lora["adapters"]
    assert full["unembedding"] == 6 * 128 * 1024 * 200
    entries = 128 * 4 * 32 * 2 + 128 * 2 * 32 * 2 + 3 * 128 * 384
    assert full["linear"] == 6 * entries * 1000
    assert format_formula(CONFIG) == (  # 6 x 196,608; 6 x 128 x 1,024; 12 x 128
        "FLOPs/step = 1.18M x tokens + 786k x trained tokens + 1.54k x attention pairs (docs/training.md)"
    )
    assert 6 * entries == 1_179_648


def test_the_formula_of_the_largest_model_fits_on_a_line():
    llama_405b = ModelConfig(128256, 16384, 53248, 126, 128, 8, 128, lora=LoraConfig(64))
    line = f"MFU         {format_formula(llama_405b)}"
    assert len(line) <= 110 and "1.62T x tokens" in line, line
    counts = (0, 7, 999.4, 999.6, 1234, 5e6, 4.04e11, 2e15)
    assert [format_count(number) for number in counts] == ["0", "7", "999", "1k", "1.23k", "5M", "404G", "2P"]


class FakeDevice:
    platform = "gpu"

    def __init__(self, device_kind):
        self.device_kind = device_kind


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peak_is_by_device_kind_and_adds_up(kind, teraflops):
    assert peak_flops([FakeDevice(kind)] * 4) == 4e12 * teraflops


def test_unknown_accelerator_has_no_mfu_and_cpu_devices_share_their_cores():
    stats = BatchStats(1000, 200, 5000)
    for kind in ("Abacus 3000", "NVIDIA L400", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v4 lite"):
        assert "perf/mfu" not in compute_perf(CONFIG, stats, 2.0, [FakeDevice(kind)])
    cpu = jax.devices()
    assert peak_flops(cpu) == peak_flops(cpu * 8) > 1e9
    perf = compute_perf(CONFIG, stats, 2.0, cpu)
    assert perf["perf/tokens_per_second"] == 500
    np.testing.assert_allclose(perf["perf/mfu"], sum(count_flops(CONFIG, stats).values()) / 2 / peak_flops(cpu))


@pytest.mark.parametrize("row_groups", [6, 2, 1])
def test_rows_that_hosts_share_count_once(monkeypatch, row_groups):
    """Six hosts: each with rows of its own, three to a row, or all at the same rows."""
    stats, cpu = BatchStats(1000, 200, 5000), jax.devices()
    alone = compute_perf(CONFIG, stats, 2.0, cpu)
    monkeypatch.setattr(jax, "process_count", lambda: 6)
    together = compute_perf(CONFIG, stats, 2.0, cpu, row_groups)
    assert together["perf/tokens_per_second"] == alone["perf/tokens_per_second"] * row_groups
    np.testing.assert_allclose(together["perf/mfu"], alone["perf/mfu"] * row_groups / 6)


def test_of_experts_those_that_a_token_meets_count():
    moe = MoeConfig(num_experts=8, experts_per_token=2, mlp_size=96)
    config = dataclasses.replace(CONFIG, moe=moe)
    attention = 128 * 4 * 32 * 2 + 128 * 2 * 32 * 2
    token = BatchStats(1, 0, 0)
    assert count_flops(config, token)["linear"] == 2 * 3 * (attention + 128 * 8 + 2 * 3 * 128 * 96)
    config = dataclasses.replace(config, lora=LoraConfig(4, targets=("q", "down")))
    assert count_flops(config, token)["adapters"] == 2 * 3 * (4 * (128 + 4 * 32) + 2 * 4 * (96 + 128))
