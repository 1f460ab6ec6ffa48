"""Mixture of experts: a router sends every token to k of E gated MLPs and adds up what they give.

The assignments of tokens to experts are sorted by expert, and each expert multiplies its own run of rows
(postrain.models.grouped_dot): the work is that of the k experts a token uses. No expert has a capacity, and no token is
dropped. Padding is assigned to no expert.

Under a mesh every device computes its own rows with its own experts (mesh axis ``expert``) and its own hidden units
(``tensor``), and the partial outputs are added up. Where the rows are split over ``expert`` too, XLA gathers them
before and scatters the sum after: with k experts a token nearly every device of the axis needs every token, so an
all-to-all would move as much, and would need buffers for the worst case or drop tokens.

Legend: B rows, T positions, N = B * T tokens, D embed_size, E experts, k experts per token, M = N * k assignments,
F hidden units of one expert, I and O the sizes in and out of any expert kernel, r LoRA rank.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from postrain.models.config import MoeConfig, accumulation_dtype
from postrain.models.grouped_dot import grouped_dot, select_backend
from postrain.models.lora import adapter_scale
from postrain.models.quantized import is_quantized, shape_of
from postrain.sharding import BATCH_AXES, named_shardings
from postrain.types import RowTerms

ROUTERS = ("softmax_topk", "topk_softmax")
HIGHEST = jax.lax.Precision.HIGHEST

_EXPERT_IN = {
    "kernel": ("experts", "embed", "mlp"),
    "bias": ("experts", "mlp"),
    "lora_a": ("experts", "embed", None),
    "lora_b": ("experts", None, "mlp"),
}
_EXPERT_OUT = {
    "kernel": ("experts", "mlp", "embed"),
    "bias": ("experts", "embed"),
    "lora_a": ("experts", "mlp", None),
    "lora_b": ("experts", None, "embed"),
}
# Logical axes of every leaf that the layer may have, without the leading axis of layers.
LOGICAL_AXES = {
    "router": {"kernel": ("embed", None), "bias": (None,)},
    "gate": _EXPERT_IN,
    "up": _EXPERT_IN,
    "down": _EXPERT_OUT,
}


@flax.struct.dataclass
class MoeAux:
    """The routing of one layer, and sums over its real tokens from which the router losses follow.

    Every sum adds up over micro-batches (``jax.tree.map(jnp.add, ...)``); stacked over layers all leaves get a
    leading axis, which the functions below understand.
    """

    expert_ids: jax.Array  # int32 [B, T, k], best first; -1 where there is padding
    expert_weights: jax.Array  # float32 [B, T, k], 0 where there is padding
    margins: jax.Array  # float32 [B, T]: logit of the last expert chosen less that of the next one, inf for padding
    expert_counts: jax.Array  # float32 [E]: tokens sent to each expert
    prob_sums: jax.Array  # float32 [E]: sum over tokens of softmax(logits)
    row_balance_sum: jax.Array  # float32: sum over rows of (tokens of the row) * (load balance of the row)
    z_sum: jax.Array  # float32: sum over tokens of logsumexp(logits)^2
    num_tokens: jax.Array  # float32
    row_balance: jax.Array  # float32 [B]: load balance of each row
    row_z: jax.Array  # float32 [B]: mean over a row's tokens of logsumexp(logits)^2

    def without_routing(self) -> "MoeAux":
        """The sums alone: what to add up over micro-batches."""
        return self.replace(expert_ids=None, expert_weights=None, margins=None, row_balance=None, row_z=None)


# Router.


def route(x_ND, p_router: dict, config: MoeConfig, routing_Nk=None):
    """``expert_ids`` int32 [N, k], best first, ``weights`` [N, k] of their outputs, ``logits`` [N, E].

    In x's ``accumulation_dtype`` at full precision whatever the compute dtype: experts that are chosen by rounding
    differ between trainer and sampler. Equal scores go to the lowest expert first (``torch.topk`` promises no order
    there). ``routing_Nk``: experts to take instead (replay); the weights are those of the present router at those
    experts. A token with an id outside 0..E-1 chooses for itself.
    """
    if config.router not in ROUTERS:
        raise ValueError(f"router {config.router!r}: expected one of {', '.join(ROUTERS)}")
    dtype = accumulation_dtype(x_ND.dtype)
    logits = jnp.dot(x_ND.astype(dtype), p_router["kernel"].astype(dtype), precision=HIGHEST)
    logits = checkpoint_name(logits, "router")
    if "bias" in p_router:
        logits = logits + p_router["bias"].astype(dtype)
    scores = jax.nn.softmax(logits, axis=-1) if config.router == "softmax_topk" else logits
    _, expert_ids = jax.lax.top_k(scores, config.experts_per_token)
    if routing_Nk is not None:
        recorded = ((routing_Nk >= 0) & (routing_Nk < config.num_experts)).all(-1, keepdims=True)
        expert_ids = jnp.where(recorded, routing_Nk, expert_ids)
    weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
    if config.router == "topk_softmax":
        weights = jax.nn.softmax(weights, axis=-1)
    elif config.norm_topk:
        weights = weights / weights.sum(-1, keepdims=True)
    return expert_ids.astype(jnp.int32), weights, logits


# Router losses.


def load_balance_loss(aux: MoeAux, *, pool_layers: bool = False) -> jax.Array:
    """E * sum_e (share of tokens sent to e) * (mean probability of e): k when balanced, up to E when not.

    Switch Transformer (Fedus et al. 2021, arXiv:2101.03961), equations 4 to 6, with top-k shares that sum to k.
    The mean over layers; ``pool_layers``: of the shares of all layers together, which is what transformers'
    ``load_balancing_loss_func`` computes, and which lets one layer's imbalance hide another's.
    """
    counts, probs, num_tokens = aux.expert_counts, aux.prob_sums, aux.num_tokens
    if pool_layers and num_tokens.ndim:
        counts, probs, num_tokens = counts.sum(0), probs.sum(0), num_tokens.sum(0)
    return _balance(counts, probs, jnp.maximum(num_tokens, 1) ** 2).mean()


def _balance(counts, probs, divisor):
    return counts.shape[-1] * (counts * probs).sum(-1) / divisor


def z_loss(aux: MoeAux) -> jax.Array:
    """Mean over tokens and layers of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022, arXiv:2202.08906, equation 5)."""
    return (aux.z_sum / jnp.maximum(aux.num_tokens, 1)).mean()


def router_loss_sum(aux: MoeAux, config: MoeConfig) -> jax.Array:
    """Coefficients times router losses, summed over the real tokens and averaged over layers: for the loss sum.

    The z term is a sum over tokens, so micro-batches add up to the whole batch. The load balance is a product of
    two means: with ``load_balance_over="row"`` the shares are those of each row, which no split into micro-batches
    or devices cuts, and it adds up too; with "batch" they are those of a micro-batch (all its devices together),
    as everybody else computes them, and the sum over micro-batches depends on the split. The metric never does:
    add up the sums and call ``load_balance_loss`` once.
    """
    num_tokens = jnp.maximum(aux.num_tokens, 1)
    by_batch = _balance(aux.expert_counts, aux.prob_sums, num_tokens)
    balance = {"batch": by_batch, "row": aux.row_balance_sum}[config.load_balance_over]
    return (config.load_balance_coef * balance + config.z_coef * aux.z_sum).mean()


def router_terms(aux: MoeAux, config: MoeConfig) -> RowTerms:
    """The router losses of each row, and what to watch; ``aux`` stacked over layers, whose mean is taken.

    Counted with a row's trained tokens, the loss of a batch does not depend on its split into micro-batches where
    the load is balanced over the "row". Metrics: ``router_load_balance`` and ``router_z``, the losses themselves, and
    ``router_busiest``, the tokens of the busiest expert over those it would have if all had the same.
    """
    everywhere = lambda x_L: jnp.full(aux.row_z.shape[1:], x_L.mean())
    balance_B = {"batch": everywhere(load_balance_loss(aux)), "row": aux.row_balance.mean(0)}[config.load_balance_over]
    z_B = aux.row_z.mean(0)
    share_L = aux.expert_counts.max(-1) / jnp.maximum(aux.expert_counts.sum(-1), 1)
    metrics = {"router_load_balance": balance_B, "router_z": z_B}
    metrics["router_busiest"] = everywhere(share_L * config.num_experts)
    loss_B = jnp.zeros_like(z_B)
    for coef, term_B in ((config.load_balance_coef, balance_B), (config.z_coef, z_B)):
        loss_B = loss_B + coef * term_B if coef else loss_B
    return RowTerms(loss_B, metrics)


def _compute_aux(expert_ids, weights, logits, mask_BT, axes_rows, axes_sequence) -> MoeAux:
    """From this device's tokens ([N, ...]) to the sums over all of them."""
    (batch, length), num_experts = mask_BT.shape, logits.shape[-1]
    per_token = lambda x: x.reshape(batch, length, -1)
    mask = mask_BT.astype(logits.dtype)
    chosen = (expert_ids[:, :, None] == jnp.arange(num_experts)).sum(1)
    over_sequence = lambda x: jax.lax.psum(x, axes_sequence) if axes_sequence else x
    counts_BE = over_sequence((per_token(chosen) * mask[:, :, None]).sum(1))
    probs_BE = over_sequence((per_token(jax.nn.softmax(logits, axis=-1)) * mask[:, :, None]).sum(1))
    tokens_B = over_sequence(mask.sum(1))
    z_B = over_sequence((per_token(jax.nn.logsumexp(logits, axis=-1))[:, :, 0] ** 2 * mask).sum(1))
    some_B = jnp.maximum(tokens_B, 1)
    balance_B = _balance(counts_BE, probs_BE, some_B)
    sums = [x.sum(0) for x in (counts_BE, probs_BE, balance_B, z_B, tokens_B)]
    sums = jax.lax.psum(sums, axes_rows) if axes_rows else sums
    ids, weights = (jnp.where(mask_BT[:, :, None], per_token(x), no) for x, no in ((expert_ids, -1), (weights, 0)))
    best = jax.lax.top_k(logits, min(expert_ids.shape[1] + 1, num_experts))[0]
    margins = jnp.full(best.shape[:1], jnp.inf) if expert_ids.shape[1] == num_experts else best[:, -2] - best[:, -1]
    margins = jnp.where(mask_BT, margins.reshape(batch, length), jnp.inf)
    return MoeAux(ids, weights, margins, *sums, balance_B / some_B, z_B / some_B)


# Assignments in the order of their experts. Taking rows there and back are each other's transpose; told so, backward
# gathers too, where it would otherwise scatter-add.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x_NI, order_M, places_M, k):
    """The row of each assignment's token, [M, I]; ``order_M`` are the assignments by expert."""
    return x_NI[order_M // k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(rows_MI, order_M, places_M, k):
    """Sum over the k assignments of each token, [N, I]; ``places_M`` says where each assignment went."""
    return (
        rows_MI[places_M]
        .reshape(-1, k, rows_MI.shape[-1])
        .sum(1, dtype=accumulation_dtype(rows_MI.dtype))
        .astype(rows_MI.dtype)
    )


_dispatch.defvjp(
    lambda x_NI, order_M, places_M, k: (_dispatch(x_NI, order_M, places_M, k), (order_M, places_M)),
    lambda k, residuals, grad_MI: (_combine(grad_MI, *residuals, k), None, None),
)
_combine.defvjp(
    lambda rows_MI, order_M, places_M, k: (_combine(rows_MI, order_M, places_M, k), (order_M, places_M)),
    lambda k, residuals, grad_NI: (_dispatch(grad_NI, *residuals, k), None, None),
)


# The layer.


class _Layout(NamedTuple):
    """Mesh axes that split what this device holds; empty: held whole."""

    rows: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    specs: Any = None  # PartitionSpec of every parameter


def moe_mlp(
    x_BTD, p: dict, config: MoeConfig, *, activation="silu", mask_BT=None, routing=None, lora_alpha=1.0
) -> tuple[jax.Array, MoeAux]:
    """Output of the layer, [B, T, D] in x's dtype (0 where there is padding), and its routing and sums.

    ``p``: the leaves of LOGICAL_AXES that the layer has; router.kernel [D, E] (bias [E]), gate and up.kernel
    [E, D, F] (bias [E, F]), down.kernel [E, F, D] (bias [E, D]), beside any expert kernel lora_a [E, I, r] and
    lora_b [E, r, O], whose product counts ``lora_alpha`` / r times; expert kernels may be quantised. ``activation``:
    "silu" (silu(gate) * up), "gelu_tanh", or "clamped_swiglu". ``mask_BT``: 0 for padding, which costs no expert work
    and counts in no loss. ``routing``: int32 [B, T, k], the ``expert_ids`` of an earlier call: the same experts again,
    see ``route``.
    """
    batch, length, _ = x_BTD.shape
    mask_BT = jnp.ones((batch, length), bool) if mask_BT is None else mask_BT != 0
    routing = jnp.full((batch, length, config.experts_per_token), -1, jnp.int32) if routing is None else routing
    body = functools.partial(_moe, config=config, activation=activation, lora_alpha=lora_alpha)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        y_BTD, aux = body(x_BTD, p, mask_BT, routing, _Layout())
        return y_BTD[0], aux
    layout = _make_layout(p, batch, length, mesh)
    tokens = layout.rows or None, layout.sequence or None
    parts = (*layout.experts, *layout.mlp) or None
    # The partial outputs leave side by side, to be added up outside: backward then needs no sum over devices there.
    rows = P(layout.rows or None)
    aux_specs = MoeAux(P(*tokens), P(*tokens), P(*tokens), P(), P(), P(), P(), P(), rows, rows)
    y_PBTD, aux = jax.shard_map(
        functools.partial(body, layout=layout),
        mesh=mesh,
        in_specs=(P(*tokens), layout.specs, P(*tokens), P(*tokens)),
        out_specs=(P(parts, *tokens), aux_specs),
        check_vma=False,
    )(x_BTD, p, mask_BT, routing)
    return jax.lax.reduce_sum(y_PBTD, axes=(0,)), aux


def logical_axes(p: dict) -> dict:
    """LOGICAL_AXES of the leaves that ``p`` has; those of a quantised kernel have their kernel's."""

    def names(path, leaf):
        axes = LOGICAL_AXES[path[0].key][path[1].key]
        return tuple(None if size == 1 else axis for size, axis in zip(leaf.shape, axes, strict=True))

    return jax.tree_util.tree_map_with_path(names, p)


def _make_layout(p, batch: int, length: int, mesh) -> _Layout:
    """Parameters as postrain.sharding lays them out; tokens over the batch axes that hold no experts or units."""
    names = logical_axes(p)
    split = lambda axes: tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if mesh.shape[a] > 1)
    specs = jax.tree.map(lambda s: P(*(split(axes) or None for axes in s.spec)), named_shardings(names, mesh, p))
    gate = jax.tree.leaves(specs["gate"]["kernel"])[0]  # of a quantised kernel all leaves are split alike
    experts, _, mlp = (split(axes) for axes in (*gate, None, None, None)[:3])
    rows = sequence = ()
    for axis in split(BATCH_AXES):
        if axis not in experts + mlp and batch % math.prod(mesh.shape[a] for a in (*rows, axis)) == 0:
            rows += (axis,)
    if "sequence" not in experts + mlp and length % mesh.shape["sequence"] == 0:
        sequence = split("sequence")
    return _Layout(rows, sequence, experts, mlp, specs)


def _gather_params(p, layout: _Layout):
    """All of what is split over other axes than experts and hidden units; backward scatters the gradient's sum."""
    if layout.specs is None:
        return p

    def gather(path, w, spec):
        names = LOGICAL_AXES[path[0].key][path[1].key]
        for i, axes in enumerate(spec):
            if axes and names[i] not in ("experts", "mlp"):
                w = jax.lax.all_gather(w, axes, axis=i, tiled=True)
        return w

    return jax.tree_util.tree_map_with_path(gather, p, layout.specs)


def _moe(x_BTD, p, mask_BT, routing_BTk, layout: _Layout, *, config: MoeConfig, activation: str, lora_alpha: float):
    """What one device does: its tokens, its experts, its hidden units. The output has a leading axis of 1."""
    batch, length, size = x_BTD.shape
    # Matrices in the compute dtype before devices exchange them; biases in its ``accumulation_dtype``.
    # Quantised kernels stay packed.
    experts = {}
    for name in ("gate", "up", "down"):
        scaled = dict(p[name])
        if "lora_b" in scaled:
            b = scaled["lora_b"].astype(jnp.promote_types(scaled["lora_b"].dtype, x_BTD.dtype))
            scaled["lora_b"] = b * adapter_scale(lora_alpha, scaled["lora_a"])
        dtypes = {leaf: accumulation_dtype(x_BTD.dtype) if leaf == "bias" else x_BTD.dtype for leaf in scaled}
        experts[name] = {leaf: w if is_quantized(w) else w.astype(dtypes[leaf]) for leaf, w in scaled.items()}
    p = _gather_params({"router": p["router"]} | experts, layout)
    x_ND = x_BTD.reshape(-1, size)
    expert_ids, weights, logits = route(x_ND, p["router"], config, routing_BTk.reshape(x_ND.shape[0], -1))
    num_local = shape_of(p["gate"]["kernel"])[0]
    first = jax.lax.axis_index(layout.experts) * num_local if layout.experts else 0
    # num_local stands for experts of other devices and for padding: sorted last, multiplied with nothing.
    mine = (expert_ids >= first) & (expert_ids < first + num_local) & mask_BT.reshape(-1, 1)
    local_ids = jnp.where(mine, expert_ids - first, num_local)
    y_ND = _run_experts(x_ND, local_ids, weights, p, config, activation)
    if "bias" in p["down"]:
        shares_NE = jnp.einsum("nk,nke->ne", weights, jax.nn.one_hot(local_ids, num_local), precision=HIGHEST)
        if layout.mlp:  # once, not with every part of the hidden units
            shares_NE = jnp.where(jax.lax.axis_index(layout.mlp) == 0, shares_NE, 0)
        y_ND = y_ND + jnp.dot(shares_NE, p["down"]["bias"], precision=HIGHEST).astype(y_ND.dtype)
    aux = _compute_aux(expert_ids, weights, logits, mask_BT, layout.rows, layout.sequence)
    return y_ND.reshape(1, batch, length, size), aux


def _run_experts(x_ND, local_ids_Nk, weights_Nk, p, config: MoeConfig, activation: str):
    """Weighted sum over each token's local experts, [N, D], without the bias of the last product."""
    k, num_local = local_ids_Nk.shape[1], shape_of(p["gate"]["kernel"])[0]
    backend = select_backend(config.backend)
    order_M = jnp.argsort(local_ids_Nk.reshape(-1), stable=True).astype(jnp.int32)
    places_M = jnp.argsort(order_M).astype(jnp.int32)
    ids_M = local_ids_Nk.reshape(-1)[order_M]
    ends_E = jnp.searchsorted(ids_M, jnp.arange(num_local, dtype=jnp.int32), side="right").astype(jnp.int32)
    group_sizes = jnp.diff(ends_E, prepend=0)

    def linear(x_MI, p):
        """Kernel, adapter and bias of each row's expert: [M, O]."""
        y = grouped_dot(x_MI, p["kernel"], group_sizes, backend)
        if "lora_a" in p:
            narrow = checkpoint_name(grouped_dot(x_MI, p["lora_a"], group_sizes, backend), "linear")
            y = y + grouped_dot(narrow, p["lora_b"], group_sizes, backend)
        y = checkpoint_name(y, "linear")  # as transformer.linear does
        if "bias" in p:
            # A product with ones and zeros, exact at full precision, so that its gradient is a product and no scatter.
            rows = jnp.dot(jax.nn.one_hot(ids_M, group_sizes.size), p["bias"], precision=HIGHEST)
            y = y + rows.astype(y.dtype)
        return y

    x_MD = _dispatch(x_ND, order_M, places_M, k)
    hidden_MF = gated_activation(linear(x_MD, p["gate"]), linear(x_MD, p["up"]), activation, config)
    # Weighted here rather than after the last product, whose output backward then does not need.
    weights_M1 = _dispatch(weights_Nk.reshape(-1, 1), order_M, places_M, 1)
    hidden_MF = (hidden_MF * weights_M1).astype(x_ND.dtype)
    y_MD = linear(hidden_MF, {name: w for name, w in p["down"].items() if name != "bias"})
    return _combine(y_MD, order_M, places_M, k)


def gated_activation(gate, up, activation: str, config: MoeConfig):
    """silu(gate) * up; gelu_tanh(gate) * up; or gpt-oss's gate * sigmoid(alpha * gate) * (up + 1), both clamped."""
    if activation == "clamped_swiglu":
        gate = jnp.minimum(gate, config.swiglu_limit)
        up = jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation {activation!r}: expected one of silu, gelu_tanh, clamped_swiglu")
    return (jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up
