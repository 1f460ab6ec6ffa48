"""What trains beside a frozen base: low-rank adapters, DoRA's magnitudes, rows of new tokens; and their merge with it.

Adapter leaves stand beside the kernel that they adapt, in the tree of postrain.models.params.
"""

from typing import Any

import jax
import jax.numpy as jnp

from postrain.models.config import LoraConfig, ModelConfig
from postrain.models.params import PARTS, ParamSpec, init_from_specs, param_specs
from postrain.models.quantized import as_array, is_quantized

ADAPTER_LEAVES = ("lora_a", "lora_b", "magnitude")  # beside the kernel that they adapt


def lora_specs(config: ModelConfig) -> dict[str, Any]:
    """Nested dict of ParamSpec for the adapters of ``config.lora``, shaped like the linear layers they stand beside."""
    assert isinstance(config.lora, LoraConfig)
    lora, layers = config.lora, param_specs(config)["layers"]
    specs: dict[str, Any] = {}
    for part in [part for part in PARTS if part in layers]:
        for name in [name for name in layers[part] if name in lora.targets]:
            kernel, rank = layers[part][name]["kernel"], lora.rank_of(name)
            *stack, size_in, size_out = kernel.shape  # layers, and experts where there are some
            *axes, axis_in, axis_out = kernel.axes
            adapters = {
                "lora_a": ParamSpec((*stack, size_in, rank), (*axes, axis_in, None), "lora_a"),
                "lora_b": ParamSpec((*stack, rank, size_out), (*axes, None, axis_out), "zeros"),
            }
            if lora.dora:
                adapters["magnitude"] = ParamSpec((*stack, size_out), (*axes, axis_out), "zeros")
            specs.setdefault(part, {})[name] = adapters
    return {"layers": specs}


def adapter_specs(config: ModelConfig) -> dict[str, Any]:
    """All that trains beside a frozen base: adapters, and the rows of new tokens beside the table that they grow.

    {} where everything trains.
    """
    specs = lora_specs(config) if config.lora else {}
    if config.new_rows is None:
        return specs
    rows = {"new_rows": ParamSpec((config.new_rows.count, config.embed_size), (None, "embed"))}
    return ({"embed": rows} if config.tie_embeddings else {"embed": rows, "unembed": rows}) | specs


def init_lora(config: ModelConfig, rng: jax.Array, params: dict | None = None) -> dict:
    """Adapters that change nothing yet (float32): A random, B zero, and with DoRA the magnitudes of ``params``."""
    adapters = init_from_specs(lora_specs(config), config, rng)
    return _init_magnitudes(adapters, params) if config.lora.dora else adapters


def _init_magnitudes(adapters: dict, params: dict) -> dict:
    if "magnitude" in adapters:  # layer by layer: a quantised stack is never whole
        return adapters | {"magnitude": jax.lax.map(lambda kernel: column_norms({"kernel": kernel}), params["kernel"])}
    return {key: _init_magnitudes(value, params[key]) for key, value in adapters.items()}


def adapter_scale(alpha: float, lora_a: jax.Array) -> float:
    """alpha / rank, the factor of an adapter's product; ``lora_a``: [..., D, rank]."""
    return alpha / lora_a.shape[-1]


def column_norms(p: dict, scale: float = 1.0, dtype=jnp.float32) -> jax.Array:
    """Norm of each output channel of kernel + ``scale`` A B over its inputs, [..., O] in ``dtype``.

    A constant to automatic differentiation.
    """
    p = jax.lax.stop_gradient(p)
    kernel = as_array(p["kernel"], dtype)
    if "lora_a" in p:
        kernel = kernel + scale * _product(p, dtype)
    return jnp.linalg.norm(kernel, axis=-2)


def _product(p: dict, dtype=jnp.float32) -> jax.Array:
    """A B in ``dtype``, [..., I, O]."""
    a, b = p["lora_a"].astype(dtype), p["lora_b"].astype(dtype)
    return jnp.einsum("...ir,...ro->...io", a, b, precision=jax.lax.Precision.HIGHEST)


def merge_lora(params: dict, config: ModelConfig, dtype: str | None = None) -> dict:
    """The tree without adapters: kernel + A B alpha / r wherever a kernel has them, computed in float32; the rows of
    new tokens in their place.

    ``dtype`` of the merged kernels; None: each kernel's own, whose rounding may lose small changes, and the compute
    dtype for a quantised kernel. Kernels without adapters stay as they are.
    """
    if not isinstance(params, dict):
        return params
    if "new_rows" in params:
        table = params["embedding"]
        table = as_array(table, config.compute_dtype) if is_quantized(table) else table
        rows = params["new_rows"].astype(table.dtype)
        return {"embedding": jax.lax.dynamic_update_slice_in_dim(table, rows, config.new_rows.first, axis=0)}
    if "lora_a" not in params:
        return {key: merge_lora(value, config, dtype) for key, value in params.items()}
    assert config.lora is not None
    kernel, scale = params["kernel"], adapter_scale(config.lora.alpha, params["lora_a"])
    dtype = dtype or (config.compute_dtype if is_quantized(kernel) else kernel.dtype)
    merged = as_array(kernel, jnp.float32) + scale * _product(params)
    if "magnitude" in params:
        merged = merged * (params["magnitude"] / column_norms(params, scale))[..., None, :]
    rest = {key: value for key, value in params.items() if key not in ADAPTER_LEAVES}
    return rest | {"kernel": merged.astype(dtype)}


def drop_adapters(params: dict) -> dict:
    """The tree without ``lora_a``, ``lora_b`` and ``magnitude``: the base model, whose arrays are shared, not copied.

    New adapters change nothing (``init_lora``), so this is the model that training began with, as long as nothing but
    adapters trains: rows of new tokens stay, trained as they are.
    """
    return {
        key: drop_adapters(value) if isinstance(value, dict) else value
        for key, value in params.items()
        if key not in ADAPTER_LEAVES
    }
