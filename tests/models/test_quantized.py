"""Quantised kernels: the published codes, exact products, nothing dequantised kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from odd_config import ODD_CONFIG

from postrain.models.config import LoraConfig, ModelConfig, MoeConfig
from postrain.models.grouped_dot import grouped_dot
from postrain.models.lora import init_lora, merge_lora
from postrain.models.params import (
    frozen_specs,
    init_params,
    make_packer,
    merge_params,
    num_params,
    param_specs,
    shapes_of,
)
from postrain.models.quantized import (
    BLOCK,
    NF4_LEVELS,
    dequantize,
    dequantize_params,
    dot,
    quantize,
    quantize_rows,
)
from postrain.models.transformer import compute_hidden, compute_logits, embed

# The constants of bitsandbytes (csrc, dDequantizeNF4), in the order of their codes.
PUBLISHED = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference_nf4(w):
    """Codes, block maxima and numbers of [I, O] with blocks down the columns: the nearest level, plainly."""
    codes, blocks = np.zeros(w.shape, np.uint8), -(-len(w) // BLOCK)
    absmax = np.zeros((blocks, w.shape[1]), np.float32)
    for column in range(w.shape[1]):
        for block in range(blocks):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            absmax[block, column] = np.abs(w[rows, column]).max()
            unit = w[rows, column] / (absmax[block, column] or 1)
            codes[rows, column] = np.abs(unit[:, None] - NF4_LEVELS).argmin(1)
    low, step = absmax.min(0), (absmax.max(0) - absmax.min(0)) / 255
    counts = np.rint((absmax - low) / np.where(step == 0, 1, step))
    return codes, low + step * counts, counts


def test_the_levels_are_the_published_ones():
    np.testing.assert_array_equal(NF4_LEVELS, np.array(PUBLISHED.split(), np.float32))


@pytest.mark.parametrize("size", [128, 200, 40])
def test_nf4_is_the_nearest_level_of_each_block(size):
    w = normal(size, 6)
    w[:, 2] = 0
    codes, absmax, counts = reference_nf4(w)
    for axis, matrix, back in ((-2, w, lambda x: x), (-1, w.T, lambda x: np.swapaxes(x, -1, -2))):
        q = quantize(jnp.asarray(matrix), "nf4", axis)
        np.testing.assert_array_equal(back(q["nf4"]), codes[::2] | codes[1::2] << 4)
        np.testing.assert_array_equal(back(q["absmax"]), counts)
        expected = NF4_LEVELS[codes] * np.repeat(absmax, BLOCK, 0)[:size]
        np.testing.assert_allclose(back(dequantize(q, "float32")), expected, rtol=1e-6, atol=0)
    assert np.abs(expected - w).max() < 0.17 * np.abs(w).max()  # half of the widest gap between levels, and rounding


def test_int8_is_absmax_of_each_output_channel():
    w = normal(40, 6)
    w[:, 3] = 0
    q = quantize(jnp.asarray(w), "int8")
    scale = np.abs(w).max(0) / 127
    np.testing.assert_array_equal(q["int8"], np.rint(w / np.where(scale == 0, 1, scale)))
    np.testing.assert_allclose(dequantize(q, "float32"), q["int8"] * scale, rtol=1e-6)
    assert (np.abs(dequantize(q, "float32") - w) <= 0.51 * scale).all()


def test_an_embedding_is_int8_with_a_scale_for_each_token():
    table = normal(10, 64)
    table[4] = 0
    q, ids = quantize_rows(jnp.asarray(table)), jnp.array([[9, 4, 0], [0, 3, 3]])
    scale = np.abs(table).max(1, keepdims=True) / 127
    np.testing.assert_allclose(q["scale"], scale, rtol=1e-6)
    np.testing.assert_array_equal(q["int8"], np.rint(table / np.where(scale == 0, 1, scale)))
    config = ModelConfig(10, 64, 64, 1, 1, 1, 64, compute_dtype="bfloat16")
    rows = lambda table: embed({"embed": {"embedding": table}}, config, ids)
    np.testing.assert_array_equal(rows(q), dequantize(q, "bfloat16")[ids])
    np.testing.assert_array_equal(rows(jnp.asarray(table)), jnp.asarray(table, "bfloat16")[ids])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "axis"), [("nf4", -2), ("nf4", -1), ("int8", -2)])
def test_products_and_gradients_are_those_of_the_dequantised_kernel(kind, axis, dtype):
    q = quantize(jnp.asarray(normal(128, 256)), kind, axis)
    x, probe = (jnp.asarray(normal(9, size, seed=size), dtype) for size in (128, 256))
    loss = lambda x, kernel: (dot(x, kernel) * probe).astype(jnp.float32).sum()
    w = dequantize(q, dtype)
    found, expected = (dot(x, q), jax.grad(loss)(x, q)), (x @ w, jax.grad(loss)(x, w))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)


def quantized_model(config, kind):
    """Frozen parameters, quantised and dequantised, and adapters that do something."""
    config = dataclasses.replace(config, quantization=kind)
    base, specs = init_params(config, jax.random.key(0)), param_specs(config)

    def pack(tree, spec, name=""):
        if isinstance(tree, dict):
            return {key: value if key == "router" else pack(value, spec[key], key) for key, value in tree.items()}
        return make_packer(spec, kind)(tree) if name in ("kernel", "embedding") else tree

    packed = pack(base, specs)
    adapters = init_lora(config, jax.random.key(1), packed)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return config, packed, dequantize_params(packed, "float32"), jax.tree.map(noise, adapters)


MOE = MoeConfig(num_experts=5, experts_per_token=2, mlp_size=36)
MODELS = {"dense": ODD_CONFIG, "experts": dataclasses.replace(ODD_CONFIG, moe=MOE)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_model_and_its_adapters_gradients_are_those_of_the_dequantised_base(kind, model):
    lora = LoraConfig(rank=4, ranks=(("q", 2), ("down", 3)), dora=model == "dense")
    config, packed, plain, adapters = quantized_model(
        dataclasses.replace(MODELS[model], init_std=0.2, lora=lora, remat="full"), kind
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), packed) == jax.tree.map(
        lambda s: (s.shape, s.dtype), shapes_of(frozen_specs(config))
    )
    tokens = jax.random.randint(jax.random.key(2), (2, 24), 0, config.vocab_size)
    rows = tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(24), tokens.shape)

    def loss(adapters, base):
        params = merge_params(adapters, base)
        logits = compute_logits(params, config, compute_hidden(params, config, *rows))[..., : config.vocab_size]
        return (logits**3).sum()

    found, expected = (jax.jit(jax.value_and_grad(loss))(adapters, base) for base in (packed, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
    # Merged, on the way to an export: the same function once more.
    merged = merge_lora(merge_params(adapters, dequantize_params(packed, "float32")), config)
    alone = dataclasses.replace(config, lora=None)
    logits = compute_logits(merged, alone, compute_hidden(merged, alone, *rows))[..., : config.vocab_size]
    np.testing.assert_allclose((logits**3).sum(), expected[0], rtol=1e-4)


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot"])
def test_grouped_products_are_those_of_the_dequantised_experts(backend):
    q = quantize(jnp.asarray(normal(4, 64, 24)), "nf4", -2)
    w, x, probe = dequantize(q, "float32"), jnp.asarray(normal(40, 64)), jnp.asarray(normal(40, 24, seed=1))
    sizes = jnp.array([7, 0, 20, 9], jnp.int32)
    loss = lambda x, w: (grouped_dot(x, w, sizes, backend) * probe).sum()
    found, expected = (jax.value_and_grad(loss)(x, kernel) for kernel in (q, w))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_nothing_dequantised_is_kept_for_backward():
    """Temporaries of a step grow with depth by what a layer's activations take, as those of a plain base do."""

    def temporaries(layers, kind):
        config = ModelConfig(
            vocab_size=64, embed_size=256, mlp_size=512, num_layers=layers, num_heads=2, num_kv_heads=2, head_dim=64
        )
        config = dataclasses.replace(config, lora=LoraConfig(rank=2), quantization=kind)
        shapes = shapes_of(frozen_specs(config))
        adapters = jax.eval_shape(lambda: init_lora(config, jax.random.key(0)))
        rows = (jax.ShapeDtypeStruct((1, 16), jnp.int32),) * 3

        def loss(adapters, base, rows):
            return compute_hidden(merge_params(adapters, base), config, *rows).sum()

        compiled = jax.jit(jax.grad(loss)).lower(adapters, shapes, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_layer = 4 * (4 * 256 * 128 + 3 * 256 * 512)
    growth = {kind: (temporaries(12, kind) - temporaries(4, kind)) / 8 for kind in ("none", "nf4", "int8")}
    assert growth["nf4"] < growth["none"] + 0.1 * one_layer, growth
    assert growth["int8"] < growth["none"] + 0.1 * one_layer, growth
    assert temporaries(4, "nf4") < temporaries(4, "none") + 1.5 * one_layer  # what is dequantised at one time


QWEN3_8B = ModelConfig(
    vocab_size=151_936,
    embed_size=4096,
    mlp_size=12_288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    qk_norm="head",
    tie_embeddings=False,
)


@pytest.mark.parametrize(("kind", "bytes_each"), [("nf4", 0.52), ("int8", 1.002)])
def test_bytes_a_parameter(kind, bytes_each):
    config = dataclasses.replace(QWEN3_8B, quantization=kind)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    held, counted = (shapes_of(f(config), jnp.bfloat16)["layers"] for f in (frozen_specs, param_specs))
    assert size(held) / num_params(counted) <= bytes_each
    if kind == "nf4":  # what docs/training.md says of the whole base, whose two embeddings are int8
        whole = size(shapes_of(frozen_specs(config), jnp.bfloat16))
        assert round(whole / num_params(shapes_of(param_specs(config))), 2) == 0.59 and round(whole / 1e9, 1) == 4.8
    # The arrays themselves, of one matrix.
    q = quantize(jnp.asarray(normal(1024, 512)), kind)
    assert sum(leaf.nbytes for leaf in q.values()) / (1024 * 512) <= bytes_each + 0.01


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="two numbers in a byte: found 7"):
        quantize(jnp.zeros((7, 4)), "nf4")
