"""A step of an objective over a mesh, and what it must be equal to: the same step on one device."""

import jax
import numpy as np
import optax

from postrain.config import MeshConfig
from postrain.models.heads import head_specs, init_heads
from postrain.models.lora import init_lora, lora_specs
from postrain.models.params import axes_of, init_params, logical_axes, shapes_of
from postrain.sharding import make_global_batch, make_mesh, named_shardings
from postrain.training.step import abstract_train_state, init_train_state, make_train_step, shardings_of
from postrain.types import Batch

OPTIMIZER = optax.sgd(1.0)


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def make_step(mesh, config, loss_fn, arrays, *, heads=(), micro_batches=1, loss_coefs=None):
    """The jitted step, its state and its batch: adapters of a random model train, and heads."""
    base = init_params(config, jax.random.key(0))
    specs = lora_specs(config) | head_specs(heads, config.embed_size)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    trained = init_lora(config, jax.random.key(1)) | init_heads(heads, config, jax.random.key(2))
    params = jax.device_put(jax.tree.map(noise, trained), named_shardings(axes_of(specs), mesh, shapes_of(specs)))
    frozen = jax.device_put(base, named_shardings(logical_axes(config), mesh, base))
    shardings = shardings_of(abstract_train_state(params, frozen, OPTIMIZER, mesh=mesh))
    state = init_train_state(params, frozen, OPTIMIZER, jax.random.key(0), mesh=mesh)
    step = make_train_step(
        loss_fn, OPTIMIZER, loss_coefs=loss_coefs, micro_batches=micro_batches, mesh=mesh, state_shardings=shardings
    )
    return step, state, Batch.from_arrays(make_global_batch(arrays, mesh))


def take_step(mesh, config, loss_fn, arrays, **options):
    """(metrics, what the step subtracts from adapters and heads: their gradient)."""
    step, state, batch = make_step(mesh, config, loss_fn, arrays, **options)
    before = jax.device_get(state.params)
    state, metrics = step(state, batch)
    return jax.device_get(metrics), jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)


def check_equal(found, expected):
    """Both as ``take_step`` returns them."""
    (metrics, moved), (expected_metrics, expected_moved) = found, expected
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(moved), jax.tree.leaves(expected_moved), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-5 * np.abs(other).max(), err_msg=jax.tree_util.keystr(path))


def lay_out(lengths, length, vocab_size):
    """Pairs of answers of these lengths, several in a row: the arrays of batches, their prompts half of an answer.

    ``lengths``: of each row those of its answers.
    """
    rng, shape = np.random.default_rng(0), (len(lengths), length)
    names = ("tokens", "targets", "segment_ids", "positions", "group_ids")
    arrays = {name: np.zeros(shape, np.int32) for name in names}
    arrays |= {name: np.zeros(shape, np.float32) for name in ("loss_mask", "scores")}
    for row, of_row in enumerate(lengths):
        start = 0
        for i, size in enumerate(of_row):
            at = row, slice(start, start + size)
            arrays["tokens"][at], arrays["targets"][at] = rng.integers(0, vocab_size, (2, size))
            arrays["segment_ids"][at], arrays["group_ids"][at] = i + 1, i // 2 + 1
            arrays["positions"][at] = np.arange(size)
            arrays["loss_mask"][at] = np.arange(size) >= size // 2
            arrays["scores"][at] = (i + row) % 2
            start += size
    return arrays
