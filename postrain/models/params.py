"""The parameter tree of the base model: names, shapes, logical axes, initialisation. postrain.models.lora adds to it.

One table (``param_specs``) says everything about every parameter; the rest is read off it. Layers are
stacked on a leading axis, matrices are [in, out] (``y = x @ kernel``), embeddings are [V', D].

Legend: L layers, D embed_size, F mlp_size, N heads, K kv heads, H head_dim, V' padded vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from postrain.models.config import ModelConfig
from postrain.models.quantized import quantize, quantize_rows
from postrain.sharding import find_mesh, replicated, to_host


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axis of each dimension (see postrain.sharding), and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # "normal" (std = config.init_std), "ones", "zeros", "lora_a"
    dtype: str | None = None  # None: what the tree as a whole is kept in


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # what may have adapters, and may be quantised under them
PARTS = ("attention", "mlp", "moe")  # of a layer, that they are in
VECTORS = ("bias", "scale", "sinks", "magnitude")  # leaves that are vectors, or numbers, of each layer and expert


def _linear(num_layers: int, size_in: int, size_out: int, axis_in: str, axis_out: str, bias: bool) -> dict:
    specs = {"kernel": ParamSpec((num_layers, size_in, size_out), ("layers", axis_in, axis_out))}
    if bias:
        specs["bias"] = ParamSpec((num_layers, size_out), ("layers", axis_out), "zeros")
    return specs


def _norm(config: ModelConfig, *shape: int) -> dict:
    axes = ("layers", None) if len(shape) == 2 else (None,)
    return {"scale": ParamSpec(shape, axes, "zeros" if config.norm_plus_one else "ones")}


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Nested dict of ParamSpec for the base model, without adapters."""
    c, num_layers = config, config.num_layers
    layers = {"attention": _attention_specs(c)}
    if c.moe:
        layers["moe"] = _moe_specs(c)
    else:
        layers["mlp"] = {
            "gate": _linear(num_layers, c.embed_size, c.mlp_size, "embed", "mlp", c.mlp_bias),
            "up": _linear(num_layers, c.embed_size, c.mlp_size, "embed", "mlp", c.mlp_bias),
            "down": _linear(num_layers, c.mlp_size, c.embed_size, "mlp", "embed", c.mlp_bias),
        }
    if c.pre_norms:
        layers |= {name: _norm(c, num_layers, c.embed_size) for name in ("attention_norm", "mlp_norm")}
    if c.post_norms:
        layers |= {name: _norm(c, num_layers, c.embed_size) for name in ("post_attention_norm", "post_mlp_norm")}
    embedding = ParamSpec((c.padded_vocab_size, c.embed_size), ("vocab", "embed"))
    specs = {"embed": {"embedding": embedding}, "layers": layers, "final_norm": _norm(c, c.embed_size)}
    return specs if c.tie_embeddings else specs | {"unembed": {"embedding": embedding}}


def _attention_specs(c: ModelConfig) -> dict[str, Any]:
    size_q, size_kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    specs = {
        "q": _linear(c.num_layers, c.embed_size, size_q, "embed", "heads", c.qkv_bias),
        "k": _linear(c.num_layers, c.embed_size, size_kv, "embed", "kv_heads", c.qkv_bias),
        "v": _linear(c.num_layers, c.embed_size, size_kv, "embed", "kv_heads", c.qkv_bias),
        "o": _linear(c.num_layers, size_q, c.embed_size, "heads", "embed", c.o_bias),
    }
    if c.qk_norm != "none":
        size = {"head": (c.head_dim, c.head_dim), "all": (size_q, size_kv)}[c.qk_norm]
        specs |= {name: _norm(c, c.num_layers, n) for name, n in zip(("q_norm", "k_norm"), size, strict=True)}
    if c.attention_sinks:
        specs["sinks"] = ParamSpec((c.num_layers, c.num_heads), ("layers", "heads"))
    return specs


def _moe_specs(c: ModelConfig) -> dict[str, Any]:
    moe, linears = c.moe, {}
    inside, outside = ("embed", c.embed_size), ("mlp", moe.mlp_size)
    for name, (axis_in, size_in), (axis_out, size_out) in (
        ("gate", inside, outside),
        ("up", inside, outside),
        ("down", outside, inside),
    ):
        shape, axes = (c.num_layers, moe.num_experts), ("layers", "experts")
        linears[name] = {"kernel": ParamSpec((*shape, size_in, size_out), (*axes, axis_in, axis_out))}
        if moe.expert_bias:
            linears[name]["bias"] = ParamSpec((*shape, size_out), (*axes, axis_out), "zeros")
    router = {"kernel": ParamSpec((c.num_layers, c.embed_size, moe.num_experts), ("layers", "embed", None))}
    if moe.router_bias:
        router["bias"] = ParamSpec((c.num_layers, moe.num_experts), ("layers", None), "zeros")
    return {"router": router} | linears


def frozen_specs(config: ModelConfig) -> dict[str, Any]:
    """``param_specs`` of a frozen base: linear layers' kernels and embeddings as ``config.quantization`` keeps them."""
    specs = param_specs(config)
    if config.quantization == "none":
        return specs
    layers = dict(specs["layers"])
    for part in [part for part in PARTS if part in layers]:
        layers[part] = {
            name: linear | {"kernel": _packed_specs(linear["kernel"], config.quantization)}
            if name in LINEARS
            else linear
            for name, linear in layers[part].items()
        }
    tables = [name for name in ("embed", "unembed") if name in specs]
    packed = {name: {"embedding": _packed_specs(specs[name]["embedding"], config.quantization)} for name in tables}
    return specs | packed | {"layers": layers}


def make_packer(spec: ParamSpec, kind: str) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """What quantises the array of a frozen kernel or embedding, or some of its matrices or rows."""
    if "vocab" in spec.axes:
        return quantize_rows
    stream = spec.axes.index("embed") - len(spec.axes)  # -2 or -1: the axis that meets the residual stream
    return functools.partial(quantize, kind=kind, axis=stream)


def _packed_specs(spec: ParamSpec, kind: str) -> dict[str, ParamSpec]:
    packed = {}
    for name, leaf in jax.eval_shape(make_packer(spec, kind), shapes_of({"": spec})[""]).items():
        axes = tuple(None if size == 1 else axis for size, axis in zip(leaf.shape, spec.axes, strict=True))
        packed[name] = ParamSpec(leaf.shape, axes, dtype=leaf.dtype.name)
    return packed


def shapes_of(specs: dict, dtype=jnp.float32) -> dict:
    """ParamSpec tree -> tree of jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype), specs)


def axes_of(specs: dict) -> dict:
    """ParamSpec tree -> tree of tuples of logical axis names."""
    return jax.tree.map(lambda s: s.axes, specs)


def abstract_params(config: ModelConfig, dtype=jnp.float32) -> dict:
    """Tree of jax.ShapeDtypeStruct of the base model."""
    return shapes_of(param_specs(config), dtype)


def logical_axes(config: ModelConfig) -> dict:
    """Tree of tuples of logical axis names of the base model."""
    return axes_of(param_specs(config))


def init_from_specs(specs: dict, config: ModelConfig, rng: jax.Array) -> dict:
    """ParamSpec tree -> tree of float32 arrays, each started as its spec says."""
    leaves, treedef = jax.tree.flatten(specs)
    arrays = []
    for spec, key in zip(leaves, jax.random.split(rng, len(leaves)), strict=True):
        if spec.init in ("ones", "zeros"):
            arrays.append(jnp.full(spec.shape, 1 if spec.init == "ones" else 0, jnp.float32))
        elif spec.init == "lora_a":
            # peft's start: kaiming uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)).
            bound = 1 / math.sqrt(spec.shape[-2])
            arrays.append(jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound))
        else:
            arrays.append(config.init_std * jax.random.normal(key, spec.shape, jnp.float32))
    return jax.tree.unflatten(treedef, arrays)


def init_params(config: ModelConfig, rng: jax.Array) -> dict:
    """Random float32 parameters; rows of the embeddings past ``vocab_size`` are zero."""
    params = init_from_specs(param_specs(config), config, rng)
    for name in ("embed", "unembed"):
        if name in params:
            rows = params[name]["embedding"]
            params[name]["embedding"] = rows.at[config.vocab_size :].set(0)
    return params


def merge_params(params: dict, frozen: dict) -> dict:
    """The one tree of two nested dicts with disjoint leaves; arrays are shared, not copied."""
    out = dict(frozen)
    for key, value in params.items():
        if key not in out:
            out[key] = value
        elif isinstance(value, dict) and isinstance(out[key], dict):
            out[key] = merge_params(value, out[key])
        else:
            raise ValueError(f"parameter {key!r} is both trained and frozen")
    return out


def name_broken(tree: Any) -> str:
    """The first array that holds a number that is not finite: its path, and its layer where it is a stack; else ""."""
    is_stack = lambda path: path[0].key == "layers"

    def check(path, array):
        finite = jnp.isfinite(array)
        return finite.reshape(array.shape[0], -1).all(1) if is_stack(path) else finite.all()

    mesh = find_mesh(tree)
    everywhere = replicated(mesh) if mesh is not None else None  # one gather for all
    checked = jax.jit(functools.partial(jax.tree_util.tree_map_with_path, check), out_shardings=everywhere)(tree)
    for path, finite in jax.tree_util.tree_leaves_with_path(jax.tree.map(to_host, checked)):
        if not finite.all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return f"layer {finite.argmin()}, {name.removeprefix('layers.')}" if is_stack(path) else name
    return ""


def num_params(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
