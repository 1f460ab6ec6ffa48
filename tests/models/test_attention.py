"""The chunked back end against softmax written out, on ragged packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import MECHANISMS, dense_attention, make_inputs

from postrain.errors import UserError
from postrain.models.attention import dispatch as attention_module
from postrain.models.attention.dispatch import attention, cached_attention, compute_visible_starts, select_backend


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 10), (3, 1, 16)])
@pytest.mark.parametrize("chunk", [16, 32, 128])
def test_equals_dense_attention_forward_and_backward(heads, chunk, mechanism):
    q, k, v, segment_ids, positions = make_inputs(*heads)
    real = (segment_ids > 0)[:, :, None, None]
    target = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32) * real
    options = dict(MECHANISMS[mechanism])
    sinks = np.linspace(-1, 2, heads[0], dtype=np.float32) if options.pop("sinks", False) else None
    window = options.pop("window", None)

    def ours(q, k, v, sinks, window):
        where = {"segment_ids": segment_ids, "positions": positions, "window": window}
        out = attention(q, k, v, **where, sinks=sinks, chunk=chunk, **options)
        return (out * target).sum(), out

    def reference(q, k, v, sinks):
        out = dense_attention(q, k, v, segment_ids, window, sinks, **options)
        return (out * target).sum(), out

    which = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    # The window is traced, as it is under the scan over layers.
    (_, out), grads = jax.jit(jax.value_and_grad(ours, which, has_aux=True))(q, k, v, sinks, window)
    (_, expected), expected_grads = jax.value_and_grad(reference, which, has_aux=True)(q, k, v, sinks)
    np.testing.assert_allclose(out * real, expected * real, atol=2e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=1e-5)


def test_a_window_of_zero_is_none():
    q, k, v, segment_ids, positions = make_inputs(2, 1, 4)
    run = lambda window: attention(q, k, v, segment_ids=segment_ids, positions=positions, window=window, chunk=16)
    np.testing.assert_array_equal(run(None), run(jnp.int32(0)))
    assert np.abs(run(None) - run(jnp.int32(3))).max() > 0.1


def test_one_document_cannot_touch_another_at_all():
    q, k, v, segment_ids, positions = make_inputs(4, 2, 8)
    first = segment_ids == 1
    rng = np.random.default_rng(2)
    changed = lambda x: np.where(first[:, :, None, None], rng.standard_normal(x.shape), x).astype(np.float32)
    q2, k2, v2 = changed(q), changed(k), changed(v)

    @jax.jit
    def run(q, k, v):
        fn = lambda q, k, v: attention(q, k, v, segment_ids=segment_ids, positions=positions, chunk=16)
        out, vjp = jax.vjp(fn, q, k, v)
        return out, *vjp(np.where(first[:, :, None, None], 0, 1).astype(np.float32) * jnp.ones_like(out))

    others = ~first
    for x, y in zip(run(q, k, v), run(q2, k2, v2), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[others], np.asarray(y)[others])
    np.testing.assert_array_equal(np.asarray(run(q, k, v)[2])[first], 0)


def test_padding_gives_finite_values_and_gradients():
    q, k, v, segment_ids, positions = make_inputs(2, 1, 4)
    fn = lambda q: attention(q, k, v, segment_ids=np.zeros_like(segment_ids), positions=positions, chunk=16).sum()
    value, grad = jax.jit(jax.value_and_grad(fn))(q)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_document_starts():
    starts = compute_visible_starts(jnp.array([[1, 1, 2, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]))
    np.testing.assert_array_equal(starts, [[0, 0, 2, 2, 2, 5, 6, 6], [0, 0, 2, 2, 2, 2, 2, 2]])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cached_attention_is_the_last_row_of_the_whole(mechanism):
    q, k, v, _, _ = make_inputs(6, 2, 8)
    options = dict(MECHANISMS[mechanism])
    if "sinks" in options:
        options["sinks"] = np.linspace(-1, 2, 6, dtype=np.float32)
    whole = dense_attention(q, k, v, np.ones(q.shape[:2], np.int32), **options)
    positions = np.array([[4, 5], [0, 1], [75, 76], [9, 10]])
    rows = np.arange(len(q))[:, None]
    heads_first = [jnp.asarray(x).transpose(0, 2, 1, 3) for x in (k, v)]
    out = cached_attention(q[rows, positions], *heads_first, positions, **options)
    np.testing.assert_allclose(out, whole[rows, positions], atol=2e-6)


def test_auto_takes_the_kernel_that_the_platform_runs(monkeypatch):
    chosen = {}
    for platform, capability in (("cpu", 9.0), ("tpu", 9.0), ("gpu", 9.0), ("gpu", 7.5), ("gpu", 0.0)):
        monkeypatch.setattr(attention_module, "current_platform", lambda platform=platform: platform)
        monkeypatch.setattr(attention_module, "gpu_capability", lambda capability=capability: capability)
        chosen[platform, capability] = select_backend("auto")
        assert select_backend("chunked") == "chunked"
    assert list(chosen.values()) == ["chunked", "flash_tpu", "flash_gpu", "chunked", "chunked"]
    with pytest.raises(UserError, match="'flash_gpu' needs an NVIDIA GPU from Ampere on"):
        select_backend("flash_gpu")
    with pytest.raises(UserError, match="'flash_tpu' runs on tpu, the devices are gpu"):
        select_backend("flash_tpu")
