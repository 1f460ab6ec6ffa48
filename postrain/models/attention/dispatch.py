"""Causal attention over packed rows.

A document is a maximal run of equal ``segment_ids`` in a row; a query sees the keys of its own document up
to itself, the last ``window`` of them where there is a window, and nothing else. Where several documents begin alike,
as the answers to a prompt do, the beginning may stand in the row once: then each query of theirs sees a second
interval, a shared prefix, and windows count as if it stood before each of them. Back ends stand behind
``attention``; ``select_backend`` says which one runs:

- "chunked": plain XLA, on every platform; the reference.
- "flash_tpu": Pallas kernels for TPUs.
- "flash_gpu": Pallas kernels for NVIDIA GPUs.

Each computes ``backend(q_BTNH, k_BSKH, v_BSKH, starts_BT, sinks_N or None, first, *, softcap, scale)``: query t, whose
index among the keys is first + t, sees the keys starts[b, t]..first + t. That one array is the whole mask of a
packed row: document, window and, where a device has a part of the row, its place. "chunked" alone takes two more
arrays, a second interval of keys for each query.

Context parallelism: over the mesh axis ``sequence`` each device has T / sequence queries of every row and gathers the
keys and values of the whole row; backward scatters the sum of their gradients. Gathered, they are 2 T K H numbers of
one layer (Llama 3 trained 128K tokens so: arXiv:2407.21783, section 3.3.2), every back end works as it is, and blocks
outside document and window are skipped. A ring would hold less, but would send all keys past every device, in
as many steps as there are devices, although few documents reach that far.

Legend: B rows, T positions or queries, S new positions or keys, M slots of a cache, N query heads, K key/value heads,
G = N / K, H head_dim.
"""

import functools
import importlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from postrain.errors import UserError
from postrain.models.attention.chunked import MASKED, chunked, soft_cap
from postrain.models.config import ModelConfig, accumulation_dtype
from postrain.sharding import BATCH_AXES, current_platform, gpu_capability
from postrain.types import Prefix

TRITON_CAPABILITY = 8.0  # of NVIDIA's GPUs, the least that Triton compiles for
BACKENDS = ("chunked", "flash_tpu", "flash_gpu")
_PLATFORMS = {"flash_tpu": "tpu", "flash_gpu": "gpu"}  # of those that do not run everywhere


def select_backend(name: str) -> str:
    """The back end that ``model.attention`` asks for, on the devices that the program is for.

    "auto" is the fastest one that they run. Raises UserError where they cannot run the one that is asked for.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"attention back end {name!r}: expected one of auto, {', '.join(BACKENDS)}")
    platform, old = current_platform(), gpu_capability() < TRITON_CAPABILITY
    if name == "auto":
        kernels = [kernel for kernel, runs_on in _PLATFORMS.items() if runs_on == platform]
        return "chunked" if platform == "gpu" and old else (*kernels, "chunked")[0]
    where = f"config key 'model.attention' = {name!r}"
    if _PLATFORMS.get(name, platform) != platform:
        raise UserError(f"{where} runs on {_PLATFORMS[name]}, the devices are {platform}: set it to auto or chunked")
    if name == "flash_gpu" and old:
        raise UserError(f"{where} needs an NVIDIA GPU from Ampere on, the devices are older: set it to auto or chunked")
    return name


def sees_prefixes(name: str) -> bool:
    """Whether the back end that ``model.attention`` asks for computes shared prefixes on the devices."""
    return select_backend(name) == "chunked"


def _select_for_prefixes(name: str) -> str:
    if name == "auto" or sees_prefixes(name):
        return "chunked"
    raise UserError(
        f"config key 'model.attention' = {name!r} computes no shared prompts: set it to auto or chunked, or "
        "'data.share_prompts' to off"
    )


def load_kernel(name: str) -> Callable:
    """The back end of that name, which is not "chunked". Imported where it is needed: Pallas takes a while."""
    return getattr(importlib.import_module(f"postrain.models.attention.{_PLATFORMS[name]}"), name)


def compute_visible_starts(segment_ids_BT: jax.Array, window: jax.Array | int | None = None) -> jax.Array:
    """First key, by its index in the row, that each query sees, int32 [B, T]; the last one is the query's own.

    This is the whole mask of a packed row. ``window`` (an integer, traced or not; 0 = none) counts the query itself.
    """
    index = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    previous = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = jax.lax.cummax(jnp.where(segment_ids_BT != previous, index, 0), axis=1)  # of the position's document
    if window is None:
        return starts_BT
    return jnp.where(window > 0, jnp.maximum(starts_BT, index - window + 1), starts_BT)


def compute_visible_prefix(
    prefix: Prefix, starts_BT: jax.Array, positions_BT: jax.Array, window: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The first key of the prefix that each query sees and the one after its last, int32 [B, T] both.

    Both are ``starts_BT``, that of ``compute_visible_starts``, where there is none. ``positions_BT`` go on from the
    prefix, so that a window reaches into its end from the beginning of every document.
    """
    lows_BT = prefix.starts
    if window is not None:
        seen = prefix.starts + positions_BT - window + 1
        lows_BT = jnp.where(window > 0, jnp.maximum(lows_BT, seen), lows_BT)
    is_none = lows_BT >= prefix.ends
    return jnp.where(is_none, starts_BT, lows_BT), jnp.where(is_none, starts_BT, prefix.ends)


def attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    *,
    segment_ids,
    positions,
    prefix: Prefix | None = None,
    window=None,
    sinks=None,
    softcap: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    chunk: int = 128,
):
    """Softmax(softcap(q k^T scale)) v within each document, [B, T, N, H] in q's dtype; softmax in its
    ``accumulation_dtype``.

    ``segment_ids`` [B, T] delimit the documents. ``positions`` [B, T] must restart with each document, or go on from
    the end of its prefix. They are required so that nobody forgets them where they matter, the rotary embedding;
    causality and windows go by the order in the row, but where a window reaches into a prefix. ``prefix``: what
    documents share; "auto" computes it by "chunked", the kernels refuse it (UserError). ``window``: keys that a query
    sees, itself included, 0 = all; it may be traced.
    ``sinks`` [N]: a logit of each head that takes its share of the softmax and gives nothing. ``softcap``: see
    ``soft_cap``. ``scale``: default 1 / sqrt(H).
    """
    starts_BT = compute_visible_starts(segment_ids, window)
    prefix_BT = () if prefix is None else compute_visible_prefix(prefix, starts_BT, positions, window)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    sinks_N = None if sinks is None else sinks.astype(accumulation_dtype(q_BTNH.dtype))
    name = select_backend(backend) if prefix is None else _select_for_prefixes(backend)
    body = functools.partial(chunked, chunk=chunk) if name == "chunked" else load_kernel(name)
    body = functools.partial(body, softcap=softcap, scale=scale)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return body(q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N, 0, *prefix_BT)
    return _sharded(body, q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N, prefix_BT, mesh)


def _sharded(body, q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N, prefix_BT, mesh):
    """Every device computes its own rows, heads and queries; only over ``sequence`` does it need others' keys."""
    ways = mesh.shape.get("tensor", 1)
    num_heads, num_kv = q_BTNH.shape[2], k_BTKH.shape[2]
    if num_heads % ways:
        raise ValueError(f"{num_heads} heads do not divide over tensor={ways}")
    if num_kv % ways:
        # Fewer key heads than devices: repeat each so that every device holds those of its queries.
        repeats = math.lcm(num_kv, ways) // num_kv
        k_BTKH, v_BTKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BTKH, v_BTKH))
        if num_heads % k_BTKH.shape[2]:
            raise ValueError(f"{num_heads} heads over {num_kv} key heads do not divide over tensor={ways}")
    heads = "tensor" if ways > 1 else None
    parts = mesh.shape.get("sequence", 1)
    # Rows of a batch divide (the config is held to it); those of a probe that do not are whole on every device.
    sequence = "sequence" if parts > 1 and q_BTNH.shape[1] % parts == 0 else None
    rows = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)

    def local(q, k, v, starts, sinks, *prefix):
        first = 0
        if sequence:
            k, v = (jax.lax.all_gather(x, sequence, axis=1, tiled=True) for x in (k, v))
            first = jax.lax.axis_index(sequence) * q.shape[1]
        return body(q, k, v, starts, sinks, first, *prefix)

    spec, per_query = P(rows, sequence, heads, None), P(rows, sequence)
    specs = spec, spec, spec, per_query, (None if sinks_N is None else P(heads)), *(per_query for _ in prefix_BT)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N, *prefix_BT)


def cached_attention(
    q_BSNH, k_BKMH, v_BKMH, positions_BS, *, window=None, sinks=None, softcap: float = 0.0, scale: float | None = None
):
    """New queries at ``positions_BS`` against M cached keys and values: slots 0..position are seen, [B, S, N, H].

    The rest as in ``attention``; a window leaves the last ``window`` of those slots.
    """
    batch, steps, num_heads, head_dim = q_BSNH.shape
    num_kv, num_slots = k_BKMH.shape[1:3]
    groups, dtype = num_heads // num_kv, accumulation_dtype(k_BKMH.dtype)
    scale = head_dim**-0.5 if scale is None else scale
    # All queries of a key head as rows of one matrix, [B, K, G*S, H]: a plain batched product with the cache.
    q = (q_BSNH * scale).astype(k_BKMH.dtype).reshape(batch, steps, num_kv, groups, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv, groups * steps, head_dim)
    scores = soft_cap(jnp.einsum("bkqh,bkmh->bkqm", q, k_BKMH, preferred_element_type=dtype), softcap)
    slots, queries = jnp.arange(num_slots), jnp.tile(positions_BS, (1, groups))[:, :, None]
    seen = slots <= queries
    if window is not None:
        seen &= (window <= 0) | (slots > queries - window)
    scores = jnp.where(seen[:, None], scores, MASKED)
    if sinks is not None:  # one more key, whose value is 0
        logits = jnp.repeat(sinks.astype(dtype).reshape(num_kv, groups), steps, axis=1)[None, :, :, None]
        scores = jnp.concatenate([scores, jnp.broadcast_to(logits, (batch, *logits.shape[1:]))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :num_slots].astype(v_BKMH.dtype)
    out = jnp.einsum("bkqm,bkmh->bkqh", weights, v_BKMH, preferred_element_type=dtype)
    out = out.reshape(batch, num_kv, groups, steps, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q_BSNH.shape).astype(q_BSNH.dtype)


# --- a kernel is held to the reference on the device that it runs on, before a run trusts it ---
#
# Kernels are tested as they are interpreted; what a compiler makes of them on a chip that no test has met is another
# matter, and a mask that is wrong by a block shows in no loss curve.

TOLERANCE = 0.03  # of the largest entry: some roundings of bfloat16, whose last bit is 0.4%; a wrong mask is 1
LENGTHS = (5, 330, 1, 1, 130, 40), (640,)  # documents of two rows of 640 positions, the first with padding


def check_backend(config: ModelConfig) -> str:
    """A line on how far the kernel that ``config.attention`` selects is from the reference here; "" for the reference.

    Raises UserError where it is further than rounding explains.
    """
    name = select_backend(config.attention)
    if name == "chunked":
        return ""
    worst, what = max((difference, what) for what, difference in compare_kernel(load_kernel(name), config).items())
    if not worst <= TOLERANCE:
        raise UserError(
            f"attention back end {name} departs from the reference on this {jax.devices()[0].device_kind} by "
            f"{worst:.1%} of the largest entry of its {what}: set model.attention=chunked, and report it"
        )
    return f"{name} is the reference within {worst:.1%} of the largest entry (of its {what})"


def compare_kernel(kernel: Callable, config: ModelConfig) -> dict[str, float]:
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
    differences = {}
    for name, ours, theirs in zip(names, run(kernel, config.compute_dtype), expected, strict=True):
        if theirs is not None:
            ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
            difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            differences[name] = difference if np.isfinite(difference) else np.inf  # NaN would pass for small
    return differences
