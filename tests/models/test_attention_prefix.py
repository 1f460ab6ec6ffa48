"""Documents that share a prefix in the row see what they would see if each had the prefix before itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import MECHANISMS, dense_attention

from postrain.errors import UserError
from postrain.models.attention import chunked as chunked_module
from postrain.models.attention import dispatch
from postrain.models.attention.dispatch import attention
from postrain.types import Prefix

TOTAL = 77
# Of each row its groups: slots of the prefix, and of what goes on from it; a document alone has no prefix.
ROWS = [
    [(20, (5, 1, 9)), (0, (3,)), (1, (2, 2))],
    [(3, (30, 4)), (7, (6, 1, 1, 8, 2))],
    [(0, (40,)), (33, (1, 2))],
    [(2, (2, 2)), (2, (2, 2, 2)), (0, (4,)), (9, (11, 13))],
]


def lay_out(groups):
    """Arrays of a row by name, and of each document the slots of the row that it is made of, prefix first."""
    row = {name: np.zeros(TOTAL, np.int32) for name in ("segment_ids", "positions", "starts", "ends")}
    start, segment, documents = 0, 0, []
    for shared, rests in groups:
        prefix = np.arange(start, start + shared)
        for length in (shared, *rests) if shared else rests:
            own, is_rest = slice(start, start + length), start > prefix[0] if shared else True
            segment, before = segment + 1, shared * is_rest
            row["segment_ids"][own], row["positions"][own] = segment, before + np.arange(length)
            if before:
                row["starts"][own], row["ends"][own] = prefix[0], prefix[-1] + 1
            if is_rest:
                documents.append(np.concatenate([prefix, np.arange(start, start + length)]))
            start += length
    assert start <= TOTAL
    return row, documents


def make_case(rows=ROWS):
    """The arrays of all rows [B, T]; and of the same rows unshared [B, U] the slot that each of their slots copies,
    their segment_ids, and [B, T] where the first copy of a slot stands."""
    laid_out = [lay_out(groups) for groups in rows]
    arrays = {name: np.stack([row[name] for row, _ in laid_out]) for name in laid_out[0][0]}
    width = max(sum(map(len, documents)) for _, documents in laid_out)
    source, segment_ids = np.zeros((2, len(rows), width), np.int32)
    first = np.zeros((len(rows), TOTAL), np.int32)
    for b, (_, documents) in enumerate(laid_out):
        slots = np.concatenate(documents)
        source[b, : len(slots)] = slots
        segment_ids[b, : len(slots)] = np.repeat(np.arange(len(documents)) + 1, [len(slots) for slots in documents])
        known, at = np.unique(slots, return_index=True)
        first[b, known] = at
    return arrays, source, segment_ids, first


def draw(arrays, heads, num_kv, size):
    rng, shape = np.random.default_rng(0), arrays["segment_ids"].shape
    q, k, v, target = (
        rng.standard_normal((*shape, n, size)).astype(np.float32) for n in (heads, num_kv, num_kv, heads)
    )
    return q, k, v, target * (arrays["segment_ids"] > 0)[:, :, None, None]


def run(arrays, q, k, v, sinks=None, window=None, **options):
    prefix = Prefix(jnp.asarray(arrays["starts"]), jnp.asarray(arrays["ends"]))
    where = {"segment_ids": arrays["segment_ids"], "positions": arrays["positions"], "prefix": prefix}
    return attention(q, k, v, **where, sinks=sinks, window=window, **options)


@pytest.mark.parametrize(
    ("mechanism", "chunk", "platform"),
    [*((name, 16, "cpu") for name in MECHANISMS), ("all", 128, "cpu"), ("all", 8, "gpu"), ("plain", 32, "gpu")],
)
def test_equals_attention_of_unshared_rows_forward_and_backward(mechanism, chunk, platform, monkeypatch):
    """On accelerators all rows of a batch are computed together, block by block."""
    monkeypatch.setattr(chunked_module, "current_platform", lambda: platform)
    arrays, source, segment_ids, first = make_case()
    q, k, v, target = draw(arrays, 6, 2, 10)
    options = dict(MECHANISMS[mechanism])
    sinks = np.linspace(-1, 2, 6, dtype=np.float32) if options.pop("sinks", False) else None
    window, rows = options.pop("window", None), np.arange(len(source))[:, None]

    def ours(q, k, v, sinks, window):
        out = run(arrays, q, k, v, sinks, window, chunk=chunk, **options)
        return (out * target).sum(), out

    def unshared(q, k, v, sinks):
        out = dense_attention(*(x[rows, source] for x in (q, k, v)), segment_ids, window, sinks, **options)
        return (out[rows, first] * target).sum(), out[rows, first]

    which = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    (_, out), grads = jax.jit(jax.value_and_grad(ours, which, has_aux=True))(q, k, v, sinks, window)
    (_, expected), expected_grads = jax.value_and_grad(unshared, which, has_aux=True)(
        *map(jnp.asarray, (q, k, v)), sinks
    )
    real = (target != 0).any((2, 3), keepdims=True)
    np.testing.assert_allclose(out * real, expected * real, atol=2e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=1e-5)


def test_blocks_between_a_prefix_and_a_document_are_skipped():
    """Keys of the answer between hold NaN: 0 times NaN would be NaN, so no block of them may be computed."""
    arrays, *_ = make_case([[(16, (40, 16))]])
    q, k, v, _ = draw(arrays, 2, 1, 4)
    between, last = slice(16, 56), slice(56, 72)
    k[:, 24:48], v[:, 24:48] = np.nan, np.nan  # the blocks that hold nothing but that answer

    @jax.jit
    def compute(q):
        out, vjp = jax.vjp(lambda q: run(arrays, q, k, v, chunk=8), q)
        return out, *vjp(jnp.zeros_like(out).at[:, last].set(1.0))

    out, dq = compute(q)
    assert np.isfinite(out[:, last]).all() and np.isfinite(dq[:, last]).all()
    assert np.isnan(out[:, between]).any() and np.isfinite(out[:, :16]).all()


def test_rows_without_prefixes_are_those_of_a_batch_that_has_none():
    arrays, *_ = make_case([[(0, (40,)), (0, (20,))], [(0, (77,))]])
    q, k, v, _ = draw(arrays, 4, 2, 8)
    where = {"segment_ids": arrays["segment_ids"], "positions": arrays["positions"]}
    np.testing.assert_array_equal(run(arrays, q, k, v, chunk=16), attention(q, k, v, **where, chunk=16))


def test_kernels_refuse_prefixes_by_name_and_auto_computes_them(monkeypatch):
    arrays, *_ = make_case(ROWS[:1])
    q, k, v, _ = draw(arrays, 2, 1, 4)
    expected = run(arrays, q, k, v, chunk=16, backend="chunked")
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    assert not dispatch.sees_prefixes("auto")
    np.testing.assert_array_equal(run(arrays, q, k, v, chunk=16), expected)
    with pytest.raises(
        UserError, match="'model.attention' = 'flash_tpu' computes no shared prompts: set it to auto or"
    ):
        run(arrays, q, k, v, backend="flash_tpu")
