"""The one decoder-only transformer: embed, rotary positions, layers under one scan, final norm, unembed.

Pure functions of (params, config, arrays); ``postrain.models.params`` has the tree.
Legend: B rows, T positions, D embed_size, F mlp_size, N heads, K kv heads, H head_dim, L layers, V' padded vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from postrain.models.attention.chunked import soft_cap
from postrain.models.attention.dispatch import attention, cached_attention, compute_visible_starts
from postrain.models.cache import KVCache, write_cache
from postrain.models.config import ModelConfig, RopeConfig, accumulation_dtype
from postrain.models.fp8 import fp8_dot
from postrain.models.lora import adapter_scale, column_norms, merge_lora
from postrain.models.moe import moe_mlp, router_terms
from postrain.models.quantized import as_array, dequantize_params, dot, is_quantized
from postrain.sharding import constrain, find_mesh, mesh_context, splits_positions
from postrain.types import Prefix

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def rms_norm(x: jax.Array, p: dict, config: ModelConfig) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in x's ``accumulation_dtype``.

    Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    dtype = accumulation_dtype(x.dtype)
    wide = x.astype(dtype)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    scale = p["scale"].astype(dtype)
    return (normed * (1 + scale if config.norm_plus_one else scale)).astype(x.dtype)


def linear(x: jax.Array, p: dict, config: ModelConfig) -> jax.Array:
    """x @ kernel, plus bias and low-rank adapter (of DoRA, with magnitudes) where ``p`` has them."""
    # One row axis: the CPU's matrix products are several times slower where backward contracts over two of them. Not
    # where positions are split too: the partitioner cannot merge two split axes and would gather one.
    rows = x if splits_positions() else x.reshape(-1, x.shape[-1])
    y = fp8_dot(rows, p["kernel"].astype(x.dtype)) if config.fp8 else dot(rows, p["kernel"])
    if "lora_a" in p:
        scale = adapter_scale(config.lora.alpha, p["lora_a"])
        wide = jnp.promote_types(p["lora_b"].dtype, x.dtype)
        narrow = checkpoint_name(rows @ p["lora_a"].astype(x.dtype), "linear")
        y = y + narrow @ (p["lora_b"].astype(wide) * scale).astype(x.dtype)
    y = checkpoint_name(y, "linear")  # the sum, not its two products: what rematerialisation keeps is kept once
    if "magnitude" in p:
        scale = p["column_scale"] if "column_scale" in p else compute_column_scale(p, config)
        y = y * scale.astype(x.dtype)
    if "bias" in p:
        y = y + p["bias"].astype(x.dtype)
    y = y.reshape(*x.shape[:-1], -1)
    return y


def compute_column_scale(p: dict, config: ModelConfig) -> jax.Array:
    """What DoRA multiplies each output channel by: its magnitude over the norm of kernel and adapter, [O]."""
    norms = column_norms(p, adapter_scale(config.lora.alpha, p["lora_a"]), accumulation_dtype(config.compute_dtype))
    norms = checkpoint_name(norms, "linear")
    return p["magnitude"] / jnp.where(norms > 0, norms, 1)  # a dead channel stays dead


def _attend(x_BTD, p, config, rotations, attend):
    """The attention sublayer; ``attend(q, k, v) -> [B, T, N, H]`` gets [B, T, N, H] and [B, T, K, H] twice."""
    h, weights = rms_norm(x_BTD, p["attention_norm"], config) if config.pre_norms else x_BTD, p["attention"]
    q, k, v = (linear(h, weights[name], config) for name in ("q", "k", "v"))
    if config.qk_norm == "all":
        q, k = rms_norm(q, weights["q_norm"], config), rms_norm(k, weights["k_norm"], config)
    q, k, v = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in (q, k, v))
    if config.qk_norm == "head":
        q, k = rms_norm(q, weights["q_norm"], config), rms_norm(k, weights["k_norm"], config)
    out = attend(apply_rotations(q, rotations), apply_rotations(k, rotations), v)
    out = linear(out.reshape(*out.shape[:2], -1), weights["o"], config)
    return x_BTD + (rms_norm(out, p["post_attention_norm"], config) if config.post_norms else out)


def _feed_forward(x_BTD, p, config, mask, routing=None):
    """The MLP sublayer, or the experts'; and the experts' routing, None without experts."""
    h = rms_norm(x_BTD, p["mlp_norm"], config) if config.pre_norms else x_BTD
    if config.moe is None:
        gate = ACTIVATIONS[config.activation](linear(h, p["mlp"]["gate"], config))
        hidden = constrain(gate * linear(h, p["mlp"]["up"], config), ("batch", "sequence", "mlp"))
        out, routed = linear(hidden, p["mlp"]["down"], config), None
    else:
        alpha = config.lora.alpha if config.lora else 1.0
        options = {"activation": config.activation, "mask_BT": mask, "routing": routing, "lora_alpha": alpha}
        out, routed = moe_mlp(h, p["moe"], config.moe, **options)
    return x_BTD + (rms_norm(out, p["post_mlp_norm"], config) if config.post_norms else out), routed


# --- rotary position embedding ---


def compute_inverse_frequencies(rope: RopeConfig, head_dim: int, dtype=np.float32) -> np.ndarray:
    """Radians per position of each of the H/2 planes, [H/2] in ``dtype``, float32 or float64.

    In float32 rounded where the models' own code rounds: at position 100,000 the last bit of a frequency is 0.006
    radians.
    """
    real = np.dtype(dtype).type
    exponents = np.arange(0, head_dim, 2, dtype=real) / real(head_dim)
    powers = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(real)
    frequencies = real(1) / powers
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / real(rope.factor)
    if rope.kind == "llama3":
        wavelengths = 1 / frequencies * real(2 * math.pi)  # a number over a tensor, as torch rounds it
        longest = rope.original_max_positions / rope.low_freq_factor
        shortest = rope.original_max_positions / rope.high_freq_factor
        turns = 1 / wavelengths * real(rope.original_max_positions)
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        between = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
        scaled = np.where(wavelengths > longest, frequencies / rope.factor, between)
        return np.where(wavelengths < shortest, frequencies, scaled).astype(real)
    if rope.kind == "yarn":
        # The plane that turns `beta` times within the original positions, as a real number.
        plane = lambda beta: (
            head_dim * math.log(rope.original_max_positions / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
        )
        first, last = plane(rope.beta_fast), plane(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first if last != first else 0.001
        ramp = np.clip((np.arange(head_dim // 2, dtype=real) - first) / width, 0, 1).astype(real)
        kept = 1 - ramp
        return (1 / (real(rope.factor) * powers) * (1 - kept) + frequencies * kept).astype(real)
    raise ValueError(f"rope kind {rope.kind!r}: expected one of default, linear, llama3, yarn")


def _rotations_by_layer(config: ModelConfig, positions_BT: jax.Array):
    """``window -> (cos, sin)``: of the layers with a window, and of those without. ``window`` may be traced.

    cos and sin of every angle, [B, T, 1, H/2]: computed once, used by every layer.
    """
    dtype, tables = accumulation_dtype(config.compute_dtype), []
    for rope in [config.rope] if config.local_rope is None else [config.rope, config.local_rope]:
        frequencies = compute_inverse_frequencies(rope, config.head_dim, dtype)
        angles = positions_BT[..., None, None].astype(dtype) * frequencies
        tables.append((jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor))
    if len(tables) == 1:
        return lambda window: tables[0]
    return lambda window: tuple(jnp.where(window > 0, near, far) for far, near in zip(*tables, strict=True))


def apply_rotations(x_BTNH: jax.Array, rotations: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (h, h + H/2) of every head; returns x's dtype."""
    cos, sin = rotations
    first, second = jnp.split(x_BTNH.astype(accumulation_dtype(x_BTNH.dtype)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


# --- embedding and layers ---


def _windows(config: ModelConfig) -> np.ndarray:
    """Window of each layer, int32 [L], 0 for none."""
    return np.asarray(config.layer_windows or (0,) * config.num_layers, np.int32)


def _rematerialize(layer, policy: str):
    """What backward keeps of a layer: everything, its matrix products, experts' and attention, or its input alone."""
    if policy == "none":
        return layer
    if policy == "full":
        return jax.checkpoint(layer, prevent_cse=False)
    if policy == "dots":
        keep = jax.checkpoint_policies.save_only_these_names("linear", "attention", "router")
        return jax.checkpoint(layer, policy=keep, prevent_cse=False)
    raise ValueError(f"remat {policy!r}: expected one of none, dots, full")


def embed(params: dict, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding in the compute dtype, [..., D]."""
    # Whole rows on every device: a table that is split along D too would be gathered after the look-up,
    # which the partitioner can only do by replicating the batch.
    table = jax.tree.map(lambda leaf: constrain(leaf, ("vocab", "embed_act")), params["embed"]["embedding"])
    x = as_array(jax.tree.map(lambda leaf: leaf[tokens], table), config.compute_dtype)
    if "new_rows" in params["embed"]:
        index = tokens - config.new_rows.first
        is_new = (index >= 0) & (index < config.new_rows.count)
        # An index past the end has no row and no gradient; one below 0 would count from the end.
        rows = params["embed"]["new_rows"].astype(x.dtype)
        rows = rows.at[jnp.where(is_new, index, len(rows))].get(mode="fill", fill_value=0)
        x = jnp.where(is_new[..., None], rows, x)
    return x if config.embed_multiplier == 1 else x * jnp.asarray(config.embed_multiplier, x.dtype)


def compute_hidden(
    params,
    config: ModelConfig,
    tokens_BT,
    segment_ids_BT,
    positions_BT,
    *,
    prefix: Prefix | None = None,
    embedded_BTD=None,
) -> jax.Array:
    """Hidden states after the final norm, [B, T, D] in the compute dtype.

    ``segment_ids_BT`` keep packed documents apart (0 = padding), ``positions_BT`` restart with each document.
    ``prefix``: what documents share with others of their row, and go on from.
    ``embedded_BTD``: the input of the first layer where it is not made of tokens (``tokens_BT`` is not read then).
    """
    return compute_hidden_and_routing(
        params, config, tokens_BT, segment_ids_BT, positions_BT, prefix=prefix, embedded_BTD=embedded_BTD
    )[0]


def compute_hidden_and_routing(
    params, config, tokens_BT, segment_ids_BT, positions_BT, routing_LBTk=None, *, prefix=None, embedded_BTD=None
):
    """``compute_hidden``, and the ``MoeAux`` of every layer, leaves stacked on a leading L; None without experts.

    ``routing_LBTk``: the ``expert_ids`` of another run, to send each token to the same experts again.
    """
    x_BTD = embed(params, config, tokens_BT) if embedded_BTD is None else embedded_BTD.astype(config.compute_dtype)
    x_BTD = constrain(x_BTD, ("batch", "sequence", "embed_act"))
    rotations_of = _rotations_by_layer(config, positions_BT)

    def layer(x_BTD, inputs):
        p, window, routing = inputs  # the pattern of windows is data: one program, however the layers alternate

        def attend(q, k, v):
            return attention(
                q,
                k,
                v,
                segment_ids=segment_ids_BT,
                positions=positions_BT,
                prefix=prefix,
                window=window if config.layer_windows else None,
                sinks=p["attention"].get("sinks"),
                softcap=config.attention_softcap,
                scale=config.attention_scale,
                backend=config.attention,
                chunk=config.attention_chunk,
            )

        x_BTD = _attend(x_BTD, p, config, rotations_of(window), attend)
        x_BTD, routed = _feed_forward(x_BTD, p, config, segment_ids_BT > 0, routing)
        return constrain(x_BTD, ("batch", "sequence", "embed_act")), routed

    inputs = params["layers"], _windows(config), routing_LBTk
    x_BTD, routed = jax.lax.scan(_rematerialize(layer, config.remat), x_BTD, inputs)
    return rms_norm(x_BTD, params["final_norm"], config), routed


def compute_hidden_and_terms(
    params, config, tokens_BT, segment_ids_BT, positions_BT, *, prefix=None, embedded_BTD=None
):
    """``compute_hidden``, and the ``RowTerms`` of the routers; None without experts. What an objective trains."""
    hidden, routed = compute_hidden_and_routing(
        params, config, tokens_BT, segment_ids_BT, positions_BT, prefix=prefix, embedded_BTD=embedded_BTD
    )
    return hidden, None if routed is None else router_terms(routed, config.moe)


def split_layers(params: dict, config: ModelConfig, old: dict | None = None) -> dict:
    """``params`` with a tuple of L trees as ``layers``, for ``compute_hidden_cached`` to run in turn.

    A copy of the layers, and nothing is quantised any more; adapters stay beside their kernels. Where XLA copies what a
    scan slices (CPU), a step of generation would otherwise copy every weight; on accelerators the scan needs no second
    copy in memory. ``old``: what this function returned for other parameters, whose layers are taken over where
    ``params`` has none of their leaves; one layer after the other is replaced.
    """
    layers = [None] * config.num_layers if old is None else list(old["layers"])
    for i, layer in enumerate(layers):
        layer = _overlay(layer, _take_layer(params.get("layers", {}), i, config))
        layers[i] = _overlay(layer, _scale_columns(layer, config)) if config.lora and config.lora.dora else layer
    rest = dequantize_params({name: p for name, p in params.items() if name != "layers"}, config.compute_dtype)
    whole = merge_lora(_overlay(old, rest), config)  # rows of new tokens in their table
    return whole | {"layers": tuple(layers)}


def _overlay(old: dict | None, new: dict) -> dict:
    """``new``, and what only ``old`` has."""
    if old is None:
        return new
    both = {key: _overlay(old.get(key), value) if isinstance(value, dict) else value for key, value in new.items()}
    return old | both


@functools.partial(jax.jit, static_argnames="config")
def _take_layer(layers, index, config):
    one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), layers)
    return jax.tree.map(lambda x: x[0], dequantize_params(one, config.compute_dtype))


@functools.partial(jax.jit, static_argnames="config")
def _scale_columns(p: dict, config: ModelConfig) -> dict:
    """The ``column_scale`` of every linear layer with magnitudes, which ``linear`` would compute at every step."""
    if "magnitude" in p:
        return {"column_scale": compute_column_scale(p, config)}
    scales = {key: _scale_columns(value, config) for key, value in p.items() if isinstance(value, dict)}
    return {key: value for key, value in scales.items() if value}


def compute_hidden_cached(params, config: ModelConfig, tokens_BS, positions_BS, cache: KVCache):
    """The next S positions of every row: hidden states after the final norm [B, S, D] and the longer cache.

    Row b's new keys and values go to slots ``positions_BS[b]``; a query at position p sees slots 0..p.
    Position -1 marks padding, of which nothing is written. The cache is stacked where ``params`` are,
    split where they come from ``split_layers``.
    """
    x_BSD = embed(params, config, tokens_BS)
    rotations_of = _rotations_by_layer(config, positions_BS)

    def run_layer(x_BSD, p, window, k_cache, v_cache, index=None):
        def attend(q, k, v):
            nonlocal k_cache, v_cache
            k_cache = write_cache(k_cache, k, positions_BS, index)
            v_cache = write_cache(v_cache, v, positions_BS, index)
            keys, values = (k_cache, v_cache) if index is None else (k_cache[index], v_cache[index])
            return cached_attention(
                q,
                keys,
                values,
                positions_BS,
                window=window if config.layer_windows else None,
                sinks=p["attention"].get("sinks"),
                softcap=config.attention_softcap,
                scale=config.attention_scale,
            )

        x_BSD = _attend(x_BSD, p, config, rotations_of(window), attend)
        x_BSD, _ = _feed_forward(x_BSD, p, config, positions_BS >= 0)
        return x_BSD, k_cache, v_cache

    def scan_layer(carry, inputs):  # the cache is carried, not scanned over, so that it is written in place
        p, window, index = inputs
        return run_layer(carry[0], p, window, carry[1], carry[2], index), None

    if isinstance(cache.k, tuple):
        k, v = [], []
        for layer in zip(params["layers"], _windows(config), cache.k, cache.v, strict=True):
            x_BSD, k_layer, v_layer = run_layer(x_BSD, *layer)
            k.append(k_layer)
            v.append(v_layer)
        cache = KVCache(k=tuple(k), v=tuple(v))
    else:
        layers = params["layers"], _windows(config), jnp.arange(config.num_layers)
        (x_BSD, k, v), _ = jax.lax.scan(scan_layer, (x_BSD, cache.k, cache.v), layers)
        cache = KVCache(k=k, v=v)
    return rms_norm(x_BSD, params["final_norm"], config), cache


def unembedding(params: dict, config: ModelConfig) -> jax.Array:
    """The projection onto the vocabulary, [V', D]: the embedding itself where the two are tied."""
    p = params["embed" if config.tie_embeddings else "unembed"]
    table, new = p["embedding"], config.new_rows
    table = as_array(table, config.compute_dtype) if is_quantized(table) else table
    if "new_rows" not in p:
        return table
    # Padded and selected, not written in place: that is how the partitioner keeps the table split.
    after = table.shape[0] - new.first - new.count
    rows = jnp.pad(p["new_rows"].astype(table.dtype), ((new.first, after), (0, 0)))
    index = jnp.arange(table.shape[0])
    return jnp.where(((index >= new.first) & (index < new.first + new.count))[:, None], rows, table)


def compute_logits(params: dict, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Logits [..., V'] of hidden states [..., D] in their ``accumulation_dtype``; past ``vocab_size`` its lowest."""
    weights, dtype = unembedding(params, config).astype(hidden.dtype), accumulation_dtype(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, weights, preferred_element_type=dtype)
    logits = soft_cap(logits, config.logits_softcap)
    return jnp.where(jnp.arange(logits.shape[-1]) < config.vocab_size, logits, jnp.finfo(dtype).min)


# --- for notebooks and tests: training never makes this array ---


def logits(params, config: ModelConfig, tokens, segment_ids=None, positions=None) -> jax.Array:
    """What follows each token.

    Args:
        params: the whole tree of parameters.
        config: of the model.
        tokens: int [T] or [B, T].
        segment_ids: like ``tokens``, documents of a row as 1, 2, ... and padding as 0; None: one document a row.
        positions: like ``tokens``; None: counted from 0 in each document.

    Returns:
        [T, V] or [B, T, V] in ``config.compute_dtype``'s accumulation type, V = ``config.vocab_size``.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    rows = jnp.atleast_2d(tokens)
    segments = jnp.ones_like(rows) if segment_ids is None else jnp.atleast_2d(jnp.asarray(segment_ids, jnp.int32))
    if positions is None:
        places = jnp.arange(rows.shape[1], dtype=jnp.int32) - compute_visible_starts(segments)
    else:
        places = jnp.atleast_2d(jnp.asarray(positions, jnp.int32))
    found = _logits(params, rows, segments, places, config=config, mesh=find_mesh(params))
    return found.reshape(*tokens.shape, config.vocab_size)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _logits(params, tokens_BT, segment_ids_BT, positions_BT, *, config, mesh):
    with mesh_context(mesh):
        hidden = compute_hidden(params, config, tokens_BT, segment_ids_BT, positions_BT)
        return compute_logits(params, config, hidden)[..., : config.vocab_size]
