"""A kernel is held to the reference on the device that it runs on, before a run trusts it.

Kernels are tested as they are interpreted; what a compiler makes of them on a chip that no test has met is another
matter, and a mask that is wrong by a block shows in no loss curve.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from postrain.errors import UserError
from postrain.models.attention.chunked import chunked
from postrain.models.attention.dispatch import compute_visible_starts, load_kernel, select_backend
from postrain.models.config import ModelConfig

TOLERANCE = 0.03  # of the largest entry: some roundings of bfloat16, whose last bit is 0.4%; a wrong mask is 1
LENGTHS = (5, 330, 1, 1, 130, 40), (640,)  # documents of two rows of 640 positions, the first with padding


def check_backend(config: ModelConfig) -> str:
    """A line on how far the kernel that ``config.attention`` selects is from the reference here; "" for the reference.

    Raises UserError where it is further than rounding explains.
    """
    name = select_backend(config.attention)
    if name == "chunked":
        return ""
    worst, what = max((difference, what) for what, difference in compare(load_kernel(name), config).items())
    if not worst <= TOLERANCE:
        raise UserError(
            f"attention back end {name} departs from the reference on this {jax.devices()[0].device_kind} by "
            f"{worst:.1%} of the largest entry of its {what}: set model.attention=chunked, and report it"
        )
    return f"{name} is the reference within {worst:.1%} of the largest entry (of its {what})"


def compare(kernel: Callable, config: ModelConfig) -> dict[str, float]:
    """Largest differences of output and gradients, over the reference's largest entries: packed rows, two key heads."""
    heads, size = 2 * (config.num_heads // config.num_kv_heads), config.head_dim
    total = max(map(sum, LENGTHS))
    segments = np.zeros((len(LENGTHS), total), np.int32)
    for row, lengths in zip(segments, LENGTHS, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    windows = {min(window, 100) for window in config.layer_windows if window}
    starts = compute_visible_starts(jnp.asarray(segments), min(windows, default=0))
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), config.compute_dtype)
    q, k, v = draw(2, total, heads, size), draw(2, total, 2, size), draw(2, total, 2, size)
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32) if config.attention_sinks else None
    weights = draw(2, total, heads, size) * jnp.asarray(segments > 0, config.compute_dtype)[:, :, None, None]
    options = {"softcap": config.attention_softcap, "scale": config.attention_scale}

    def run(body, dtype):
        def loss(inputs):
            out = body(*inputs[:3], starts, inputs[3], 0, **options)
            return (out * weights).astype(jnp.float32).sum(), out * (weights != 0)

        cast = lambda x: None if x is None else x.astype(dtype)
        inputs = [cast(q), cast(k), cast(v), sinks]
        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
        return [out, *grads]

    with jax.default_matmul_precision("highest"):
        expected = run(lambda *inputs, **more: chunked(*inputs, chunk=128, **more), jnp.float32)
    names = "output", "gradient of queries", "gradient of keys", "gradient of values", "gradient of sinks"
    found = zip(names, run(kernel, config.compute_dtype), expected, strict=True)
    return {name: _difference(ours, theirs) for name, ours, theirs in found if theirs is not None}


def _difference(ours, theirs) -> float:
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return difference if np.isfinite(difference) else np.inf  # NaN would pass for small
