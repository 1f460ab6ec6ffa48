"""In which dtype a sensitive computation is done."""

import jax.numpy as jnp


def accumulation_dtype(dtype) -> jnp.dtype:
    """Of norms, rotations, softmaxes, routers, logits and sums of products: float32, or float64 where ``dtype`` is.

    Never a cast to float32 itself: a float64 run is the yardstick of the others (postrain.hf.verify), and must be
    float64 throughout.
    """
    return jnp.promote_types(dtype, jnp.float32)
