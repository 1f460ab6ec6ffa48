"""The kernels against softmax written out: packed rows, windows, caps, sinks, parts of a row.

Where their device is not there they are interpreted. On one they run: set JAX_PLATFORMS=tpu, or cuda, for this file.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LONG_ROWS, MECHANISMS, dense_attention, make_inputs

from postrain.errors import UserError
from postrain.models.attention.chunked import chunked
from postrain.models.attention.dispatch import attention, compute_visible_starts, select_backend
from postrain.models.attention.gpu import flash_gpu
from postrain.models.attention.tpu import MAX_PAIRS, flash_tpu

HERE = jax.default_backend()
BACKENDS = {
    "chunked": functools.partial(chunked, chunk=64),
    "flash_tpu": functools.partial(flash_tpu, max_block=128, interpret=HERE != "tpu"),
    "flash_gpu": functools.partial(flash_gpu, max_block=32, interpret=HERE != "gpu"),
}
PLATFORMS = {"flash_tpu": "tpu", "flash_gpu": "gpu"}
KERNELS = list(PLATFORMS)
CASES = [  # each mechanism, each number of queries a key head: 1, 2, 3, 8; head_dims that are no power of two
    ("plain", (4, 4, 8)),
    ("window", (6, 2, 10)),
    ("window of one", (2, 1, 16)),
    ("soft cap", (8, 1, 16)),
    ("sinks", (4, 2, 12)),
    ("all", (8, 1, 10)),
]


def make_case(mechanism, heads):
    q, k, v, segment_ids, _ = make_inputs(*heads, rows=LONG_ROWS, total=299)
    options = {"softcap": 0.0, "scale": heads[2] ** -0.5} | MECHANISMS[mechanism]
    sinks = np.linspace(-1, 2, heads[0], dtype=np.float32) if options.pop("sinks", False) else None
    return q, k, v, segment_ids, sinks, options.pop("window", 0), options


def value_and_gradients(fn, target, *arrays):
    which = tuple(i for i, array in enumerate(arrays) if array is not None)
    value = lambda *arrays: (fn(*arrays) * target).sum()
    with jax.default_matmul_precision("highest"):  # float32 products on accelerators too
        return jax.jit(lambda *arrays: (fn(*arrays), jax.grad(value, which)(*arrays)))(*arrays)


@pytest.mark.parametrize(("mechanism", "heads"), CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_equals_dense_attention_forward_and_backward(name, mechanism, heads):
    q, k, v, segment_ids, sinks, window, options = make_case(mechanism, heads)
    real = (segment_ids > 0)[:, :, None, None]
    target = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32) * real

    def ours(q, k, v, sinks):
        return BACKENDS[name](q, k, v, compute_visible_starts(segment_ids, window), sinks, 0, **options)

    def reference(q, k, v, sinks):
        return jnp.where(real, dense_attention(q, k, v, segment_ids, window, sinks, **options), 0)

    out, grads = value_and_gradients(ours, target, q, k, v, sinks)
    with jax.enable_x64(True):  # so that the reference adds no rounding of its own
        wide = (None if x is None else np.asarray(x, np.float64) for x in (target, q, k, v, sinks))
        expected, expected_grads = value_and_gradients(reference, *wide)
    np.testing.assert_allclose(out * real, expected, atol=2e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_part_of_the_queries_against_all_keys(name):
    """What a device of a sequence mesh computes: the parts' outputs side by side and key gradients added up."""
    q, k, v, segment_ids, sinks, window, options = make_case("all", (4, 2, 12))
    starts = compute_visible_starts(segment_ids, window)
    target = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
    run = functools.partial(BACKENDS[name], **options)
    out, (dq, dk, dv, dsinks) = value_and_gradients(
        lambda q, k, v, sinks: run(q, k, v, starts, sinks, 0), target, q, k, v, sinks
    )
    parts = []
    for first, end in ((0, 130), (130, 299)):
        part = slice(first, end)
        fn = lambda q, k, v, sinks, part=part: run(q, k, v, starts[:, part], sinks, jnp.int32(part.start))
        parts.append(value_and_gradients(fn, target[:, part], q[:, part], k, v, sinks))
    joined = lambda pieces: np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(joined([part for part, _ in parts]), out, atol=2e-6)
    np.testing.assert_allclose(joined([grads[0] for _, grads in parts]), dq, atol=1e-5)
    for i, whole in ((1, dk), (2, dv), (3, dsinks)):
        np.testing.assert_allclose(sum(grads[i] for _, grads in parts), whole, atol=2e-5)
    assert np.abs(parts[0][1][1][:, 130:]).max() == 0, "keys after all queries have no gradient"


@pytest.mark.parametrize("name", BACKENDS)
def test_one_document_cannot_touch_another_at_all(name):
    q, k, v, segment_ids, sinks, window, options = make_case("all", (4, 2, 12))
    starts, first = compute_visible_starts(segment_ids, window), segment_ids == 1
    rng = np.random.default_rng(2)
    changed = [
        np.where(first[:, :, None, None], 100 * rng.standard_normal(x.shape), x).astype(np.float32) for x in (q, k, v)
    ]
    target = rng.standard_normal(q.shape).astype(np.float32) * ~first[:, :, None, None]
    fn = lambda q, k, v: BACKENDS[name](q, k, v, starts, sinks, 0, **options)
    (out, grads), (out2, grads2) = (value_and_gradients(fn, target, *x) for x in ((q, k, v), changed))
    for x, y in zip((out, *grads), (out2, *grads2), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[~first], np.asarray(y)[~first])
    for grad in grads:
        np.testing.assert_array_equal(np.asarray(grad)[first], 0)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_rounds_as_the_reference_does(name):
    q, k, v, segment_ids, sinks, window, options = make_case("all", (4, 2, 16))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    starts = compute_visible_starts(segment_ids, window)
    real = (segment_ids > 0)[:, :, None, None]
    run = lambda fn: value_and_gradients(
        lambda *arrays: fn(*arrays, starts, sinks, 0, **options) * real, np.float32(1), *arrays
    )
    (out, grads), (expected, expected_grads) = run(BACKENDS[name]), run(BACKENDS["chunked"])
    for x, y in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


def test_padding_gives_finite_values_and_gradients():
    q, k, v, segment_ids, *_ = make_case("plain", (2, 1, 8))
    starts = compute_visible_starts(np.zeros_like(segment_ids))
    for name in KERNELS:
        fn = lambda *arrays, name=name: BACKENDS[name](*arrays, starts, None, 0, softcap=0.0, scale=1.0)
        for x in jax.tree.leaves(value_and_gradients(fn, np.float32(1), q, k, v)):
            assert np.isfinite(x).all()


def test_what_the_devices_cannot_run_is_refused_by_name():
    auto = [name for name, platform in PLATFORMS.items() if platform == HERE]
    assert select_backend("auto") == (auto or ["chunked"])[0] and select_backend("chunked") == "chunked"
    q = jnp.zeros((1, 4, 1, 8))
    where = {"segment_ids": jnp.ones((1, 4), jnp.int32), "positions": None}
    for name in set(KERNELS) - set(auto):
        message = f"'model.attention' = '{name}' runs on {PLATFORMS[name]}, the devices are {HERE}: set it to auto"
        with pytest.raises(UserError, match=message):
            attention(q, q, q, **where, backend=name)
    with pytest.raises(ValueError, match="expected one of auto, chunked, flash_tpu, flash_gpu"):
        select_backend("splash")


def test_a_row_with_more_blocks_than_can_be_listed_is_refused():
    length = 2**20
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.bfloat16)] * 3
    starts = jax.ShapeDtypeStruct((1, length), jnp.int32)
    assert (length // 512) ** 2 // 2 > MAX_PAIRS
    run = lambda q, k, v, starts: flash_tpu(q, k, v, starts, None, 0, softcap=0.0, scale=1.0)
    with pytest.raises(UserError, match="1 rows of 1048576 positions a device .* raise mesh.sequence"):
        jax.eval_shape(run, *shapes, starts)
