"""Products in float8 against the same arithmetic in numpy, what they cost in precision, a model that learns."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from odd_config import ODD_CONFIG

from postrain.models.fp8 import fp8_dot, quantize
from postrain.models.params import init_params
from postrain.models.transformer import compute_hidden, compute_logits

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def round_to(x, dtype):
    """What ``x`` becomes with its largest entry at the end of ``dtype``'s range."""
    scale = np.float32(np.abs(x).max()) / np.float32(ml_dtypes.finfo(dtype).max)
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float32) * scale


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return draw(37, 60) * 3, draw(60, 45) * 0.02, draw(37, 45) * 1e-6


def test_product_and_gradients_are_those_of_rounded_operands(operands):
    x, w, grad = operands
    y, backward = jax.vjp(fp8_dot, x, w)
    dx, dw = backward(grad)
    x8, w8, g8 = round_to(x, E4M3), round_to(w, E4M3), round_to(grad, E5M2)
    for ours, expected in ((y, x8 @ w8), (dx, g8 @ w8.T), (dw, x8.T @ g8)):
        np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected).max())


def test_error_is_that_of_the_mantissas(operands):
    """Rounding to m bits errs by about 2^-m / sqrt(24) of an entry: 3.6% of a product in e4m3, 5% with one e5m2."""
    x, w, grad = operands
    y, backward = jax.vjp(fp8_dot, x, w)
    dx, dw = backward(grad)
    error = lambda ours, exact: np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 0.01 < error(y, x @ w) < 0.045
    assert 0.01 < error(dx, grad @ w.T) < 0.065
    assert 0.01 < error(dw, x.T @ grad) < 0.065


def test_zeros_and_dtypes():
    x, w = jnp.zeros((3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
    y, backward = jax.vjp(fp8_dot, x, w)
    assert y.dtype == jnp.bfloat16 and not np.asarray(y).any()
    assert [g.dtype for g in backward(jnp.zeros_like(y))] == [jnp.bfloat16] * 2
    q, scale = quantize(jnp.array([1e-36, -2e-36, 0]), jnp.float8_e5m2)  # a scale would be flushed to 0
    assert scale > 0 and np.isfinite(np.asarray(q, np.float32)).all() and np.abs(np.asarray(q, np.float32)).max() < 1e3
    q, scale = quantize(jnp.array([-2.0, 0.5]), jnp.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(q, np.float32) * scale, [-2.0, 0.5])
    assert not np.isfinite(np.asarray(fp8_dot(x.at[0, 0].set(jnp.nan), w), np.float32)).all()


def test_a_model_learns_with_it_and_its_matrices_go_through_it():
    config = dataclasses.replace(ODD_CONFIG, fp8=True, init_std=0.1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)

    def loss_fn(params, config):
        logits = compute_logits(params, config, compute_hidden(params, config, tokens, ones, positions))
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    params = init_params(config, jax.random.key(0))
    text = str(jax.make_jaxpr(lambda p: loss_fn(p, config))(params))
    assert text.count("f8_e4m3fn") >= 2 * 7  # q, k, v, o, gate, up, down in the body of the one scan
    exact = loss_fn(params, dataclasses.replace(config, fp8=False))
    assert 0 < abs(loss_fn(params, config) - exact) < 0.05 * exact

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, config), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(40):
        params, state = step(params, state)
    assert loss_fn(params, config) < 0.1 * exact
