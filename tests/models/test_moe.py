"""The mixture of experts against transformers' own, and what its routing, losses and adapters promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, load_balancing_loss_func

from postrain.models.config import MoeConfig
from postrain.models.grouped_dot import BACKENDS, _pallas_gradient, grouped_dot, select_backend
from postrain.models.moe import load_balance_loss, moe_mlp, route, router_loss_sum, z_loss

D, F, E, K = 40, 24, 6, 2
QWEN = MoeConfig(num_experts=E, experts_per_token=K, mlp_size=F)
GPT_OSS = dataclasses.replace(QWEN, router="topk_softmax", router_bias=True, expert_bias=True)
FAMILIES = {"qwen": (QWEN, "silu"), "gpt_oss": (GPT_OSS, "clamped_swiglu")}

run_moe = jax.jit(moe_mlp, static_argnames=("config", "activation", "lora_alpha"))


def make_params(config, seed=0, rank=0):
    """Random leaves, with biases and adapters where asked."""
    rng = np.random.default_rng(seed)
    size_e, size_f = config.num_experts, config.mlp_size
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) * shape[-2] ** -0.5, jnp.float32)
    p = {"router": {"kernel": 2 * normal(D, size_e)}}
    if config.router_bias:
        p["router"]["bias"] = 0.5 * normal(1, size_e)[0]
    for name, size_in, size_out in (("gate", D, size_f), ("up", D, size_f), ("down", size_f, D)):
        p[name] = {"kernel": normal(size_e, size_in, size_out)}
        if config.expert_bias:
            p[name]["bias"] = normal(size_e, 1, size_out)[:, 0]
        if rank:
            p[name] |= {"lora_a": normal(size_e, size_in, rank), "lora_b": normal(size_e, rank, size_out)}
    return p


def make_inputs(batch=2, length=9, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, length, D)), jnp.float32)


def dense_moe(x_BTD, p, config, activation="silu", lora_scale=1.0, routing=None):
    """Every expert on every token, weights zero but for the chosen: an independent formulation."""
    logits = x_BTD @ p["router"]["kernel"] + p["router"].get("bias", 0.0)
    scores = jax.nn.softmax(logits) if config.router == "softmax_topk" else logits
    ids = jnp.argsort(-scores, axis=-1, stable=True)[..., : config.experts_per_token] if routing is None else routing
    chosen = jax.nn.one_hot(ids, config.num_experts).sum(-2)
    if config.router == "topk_softmax":
        weights = jax.nn.softmax(jnp.where(chosen > 0, logits, -jnp.inf))
    else:
        weights = scores * chosen
        weights = weights / weights.sum(-1, keepdims=True) if config.norm_topk else weights

    def linear(spec, x, q):
        kernel = q["kernel"]
        if "lora_a" in q:
            kernel = kernel + lora_scale * jnp.einsum("eir,ero->eio", q["lora_a"], q["lora_b"])
        return jnp.einsum(spec, x, kernel) + q.get("bias", jnp.zeros((config.num_experts, 1)))

    gate, up = (linear("btd,edf->btef", x_BTD, p[name]) for name in ("gate", "up"))
    if activation == "clamped_swiglu":
        gate, up = jnp.minimum(gate, config.swiglu_limit), jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
        hidden = (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)
    else:
        hidden = jax.nn.silu(gate) * up
    return jnp.einsum("bted,bte->btd", linear("btef,efd->bted", hidden, p["down"]), weights)


def assert_close(found, expected, tolerance, message=""):
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=message)


def assert_trees_close(found, expected, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, tolerance, jax.tree_util.keystr(path))


# Against torch.


def qwen_block(num_experts, k, norm_topk):
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=num_experts, num_experts_per_tok=k, norm_topk_prob=norm_topk
    )
    return Qwen3MoeSparseMoeBlock(config)


def mixtral_block(num_experts, k):
    return MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=num_experts, num_experts_per_tok=k)
    )


def gpt_oss_block(num_experts, k):
    return GptOssMLP(
        GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=num_experts, num_experts_per_tok=k)
    )


def to_jax(values):
    """This library's tree from the tensors of a block by name: values, or gradients."""
    array = lambda tensor: jnp.asarray(np.ascontiguousarray(tensor.detach().numpy()))
    if "experts.gate_up_proj_bias" in values:  # gpt-oss: [E, in, out], gate and up interleaved
        both, bias = values["experts.gate_up_proj"], values["experts.gate_up_proj_bias"]
        return {
            "router": {"kernel": array(values["router.weight"].T), "bias": array(values["router.bias"])},
            "gate": {"kernel": array(both[..., ::2]), "bias": array(bias[..., ::2])},
            "up": {"kernel": array(both[..., 1::2]), "bias": array(bias[..., 1::2])},
            "down": {"kernel": array(values["experts.down_proj"]), "bias": array(values["experts.down_proj_bias"])},
        }
    gate, up = values["experts.gate_up_proj"].mT.chunk(2, dim=-1)  # [E, out, in], gate over up
    return {
        "router": {"kernel": array(values["gate.weight"].T)},
        "gate": {"kernel": array(gate)},
        "up": {"kernel": array(up)},
        "down": {"kernel": array(values["experts.down_proj"].mT)},
    }


def randomize(block, scale=1.0):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            size = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(scale * torch.randn_like(parameter) * size**-0.5)
    return block


def run_torch(block, x, probe):
    """Output and gradients of sum(output * probe) with respect to the input and the parameters."""
    x = torch.tensor(np.asarray(x), requires_grad=True)
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.tensor(np.asarray(probe))).sum().backward()
    return y.detach().numpy(), x.grad.numpy(), to_jax({name: w.grad for name, w in block.named_parameters()})


BLOCKS = {
    "qwen3_moe": (lambda: qwen_block(8, 3, True), MoeConfig(8, 3, F), "silu"),
    "qwen3_moe, weights as they are": (lambda: qwen_block(8, 3, False), MoeConfig(8, 3, F, norm_topk=False), "silu"),
    "more experts than tokens": (lambda: qwen_block(64, 2, True), MoeConfig(64, 2, F), "silu"),
    "all experts": (lambda: qwen_block(5, 5, True), MoeConfig(5, 5, F), "silu"),
    "mixtral": (lambda: mixtral_block(4, 2), MoeConfig(4, 2, F), "silu"),
    "gpt_oss": (
        lambda: gpt_oss_block(8, 3),
        MoeConfig(8, 3, F, router="topk_softmax", router_bias=True, expert_bias=True),
        "clamped_swiglu",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_gradients_are_those_of_transformers(name, backend):
    make_block, config, activation = BLOCKS[name]
    # Large enough for gpt-oss's clamps to bite.
    block, x = randomize(make_block(), 4.0 if name == "gpt_oss" else 1.0), make_inputs(3, 11)
    probe = jax.random.normal(jax.random.key(0), x.shape)
    expected, expected_dx, expected_dp = run_torch(block, x, probe)
    config = dataclasses.replace(config, backend=backend)
    p = to_jax(dict(block.named_parameters()))

    def loss(x, p):
        y, _ = run_moe(x, p, config, activation=activation)
        return (y * probe).sum(), y

    (_, y), (dx, dp) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, p)
    assert_close(y, expected, 1e-5)
    assert_close(dx, expected_dx, 1e-4)
    assert_trees_close(dp, expected_dp, 1e-4)


# Grouped products.

GROUPS = [[3, 0, 70, 1, 0, 26], [0, 0, 0, 0, 0, 0], [100, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 97], [17] * 5 + [3]]


@pytest.mark.parametrize("group_sizes", GROUPS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_dot_of_ragged_groups(backend, group_sizes):
    rng = np.random.default_rng(0)
    x, w, probe = rng.standard_normal((100, 20)), rng.standard_normal((6, 20, 12)), rng.standard_normal((100, 12))
    expected, dx, dw = np.zeros((100, 12)), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(group_sizes)
    for group, (start, end) in enumerate(zip(ends - group_sizes, ends, strict=True)):
        rows = slice(start, end)
        expected[rows], dx[rows] = x[rows] @ w[group], probe[rows] @ w[group].T
        dw[group] = x[rows].T @ probe[rows]
    x, w, probe = (jnp.asarray(a, jnp.float32) for a in (x, w, probe))
    sizes = jnp.asarray(group_sizes, jnp.int32)

    @jax.jit
    def run(x, w, probe, sizes):
        y, vjp = jax.vjp(lambda x, w: grouped_dot(x, w, sizes, backend), x, w)
        return y, *vjp(probe)

    for found, wanted in zip(run(x, w, probe, sizes), (expected, dx, dw), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    if backend == "ragged_dot":  # on a TPU the gradient of w is this kernel's
        kernel = _pallas_gradient(x, probe, sizes, jnp.float32, interpret=True)
        np.testing.assert_allclose(kernel, dw, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_assignments_than_experts(tokens):
    """A step of generation."""
    config = MoeConfig(num_experts=32, experts_per_token=4, mlp_size=F)
    x, p = make_inputs(tokens, 1), make_params(config)
    assert_close(run_moe(x, p, config)[0], dense_moe(x, p, config), 1e-5)


def test_backends_are_named():
    assert select_backend("auto") == "blocks"  # tests run on CPU
    assert [select_backend(name) for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(ValueError, match="expected one of auto, ragged_dot, blocks"):
        select_backend("dense")


# Routing.


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax"])
def test_ties_go_to_the_lowest_expert(router):
    config = MoeConfig(num_experts=16, experts_per_token=5, mlp_size=F, router=router)
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (200, 16)).astype(np.float32)  # almost every choice is one among equals
    ids, weights, _ = route(jnp.asarray(logits), {"kernel": jnp.eye(16)}, config)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :5])
    values = torch.topk(torch.tensor(logits), 5).values  # torch's order among equals is its own, the values are not
    np.testing.assert_allclose(weights, torch.softmax(values, -1).numpy(), rtol=1e-6)
    ids, weights, _ = route(jnp.zeros((3, 16)), {"kernel": jnp.eye(16)}, config)
    np.testing.assert_array_equal(ids, np.tile(np.arange(5), (3, 1)))
    np.testing.assert_allclose(weights, 0.2, rtol=1e-6)


def test_where_torch_breaks_ties_otherwise_its_experts_can_be_given():
    block = randomize(qwen_block(8, 3, True))
    with torch.no_grad():
        block.gate.weight.zero_()
    x = make_inputs()
    probe = jnp.ones_like(x)
    expected, expected_dx, _ = run_torch(block, x, probe)
    chosen = block.gate(torch.tensor(np.asarray(x)))[2].numpy().reshape(*x.shape[:2], 3)
    p, config = to_jax(dict(block.named_parameters())), MoeConfig(8, 3, F)
    assert (chosen != np.arange(3)).any()
    y, vjp = jax.vjp(lambda x: run_moe(x, p, config, routing=jnp.asarray(chosen, jnp.int32))[0], x)
    assert_close(y, expected, 1e-5)
    assert_close(vjp(probe)[0], expected_dx, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_given_back_is_the_same_computation(family):
    config, activation = FAMILIES[family]
    x, p = make_inputs(), make_params(config)

    @jax.jit
    def run(routing):
        y, vjp = jax.vjp(lambda x, p: moe_mlp(x, p, config, activation=activation, routing=routing)[0], x, p)
        return y, vjp(y)

    _, aux = run_moe(x, p, config, activation=activation)
    own = run(jnp.full_like(aux.expert_ids, -1))
    for found, expected in zip(jax.tree.leaves(run(aux.expert_ids)), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_keeps_the_experts_and_recomputes_the_weights(family):
    config, activation = FAMILIES[family]
    x, old, new = make_inputs(), make_params(config), make_params(config, seed=5)
    _, recorded = run_moe(x, old, config, activation=activation)
    _, own = run_moe(x, new, config, activation=activation)
    assert (own.expert_ids != recorded.expert_ids).any()
    # The first token has nothing recorded, the second in part, the third an expert of another model.
    routing = recorded.expert_ids.at[0, 0].set(-1).at[0, 1, 0].set(-1).at[0, 2, 1].set(E)
    expected_ids = recorded.expert_ids.at[0, :3].set(own.expert_ids[0, :3])

    def loss(p, replay):
        if not replay:
            return (dense_moe(x, p, config, activation, routing=expected_ids) * x).sum()
        y, aux = moe_mlp(x, p, config, activation=activation, routing=routing)
        return (y * x).sum(), aux

    (found, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(new, True)
    expected, expected_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(new, False)
    np.testing.assert_array_equal(aux.expert_ids, expected_ids)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(grads["router"]["kernel"]).max() > 1e-2
    assert_trees_close(grads, expected_grads, 1e-5)
    np.testing.assert_allclose(aux.expert_weights.sum(-1), 1, rtol=1e-6)


def test_the_router_is_float32_whatever_the_compute_dtype():
    x, p = make_inputs().astype(jnp.bfloat16), make_params(QWEN)
    y, aux = run_moe(x, p, QWEN)
    expected, expected_aux = run_moe(x.astype(jnp.float32), p, QWEN)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(aux.expert_ids, expected_aux.expert_ids)
    np.testing.assert_array_equal(aux.expert_weights, expected_aux.expert_weights)
    assert_close(y.astype(jnp.float32), expected, 2e-2)


# What one token's output depends on.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_does_not_touch_another(family):
    config, activation = FAMILIES[family]
    x, p = make_inputs(3, 37), make_params(config)
    run = jax.jit(lambda x: run_moe(x, p, config, activation=activation)[0])
    before = np.asarray(run(x))
    for row, position in ((0, 0), (1, 20), (2, 36)):
        after = np.asarray(run(x.at[row, position].multiply(-3)))
        changed = (before != after).any(-1)
        assert changed[row, position] and changed.sum() == 1
    order = np.random.default_rng(0).permutation(37)
    np.testing.assert_array_equal(run(x[:, order]), before[:, order])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_and_gets_nothing(family):
    config, activation = FAMILIES[family]
    x, p = make_inputs(2, 30), make_params(config)
    mask = jnp.arange(30) < jnp.asarray([[30], [17]])
    padded = jnp.where(mask[:, :, None], x, 1e3)

    def run(x):
        y, aux = run_moe(x, p, config, activation=activation, mask_BT=mask)
        return y, aux

    (y, aux), (y_other, aux_other) = run(x), run(padded)
    for found, expected in zip(jax.tree.leaves((y_other, aux_other)), jax.tree.leaves((y, aux)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not np.asarray(y[1, 17:]).any()
    assert (np.asarray(aux.expert_ids[1, 17:]) == -1).all() and not np.asarray(aux.expert_weights[1, 17:]).any()
    assert aux.num_tokens == 47 and aux.expert_counts.sum() == 47 * K
    alone, _ = run_moe(x[1:, :17], p, config, activation=activation)
    np.testing.assert_allclose(y[1:, :17], alone, atol=1e-5)
    total = lambda x: run(x)[0].sum() + router_loss_sum(run(x)[1], dataclasses.replace(config, z_coef=1.0))
    dx = jax.jit(jax.grad(total))(padded)
    assert not np.asarray(dx[1, 17:]).any() and np.asarray(dx[1, :17]).all()


# Router losses.


def make_layers(mask=None):
    """Aux of three layers, stacked, and the logits of each as torch wants them."""
    auxes, logits = [], []
    for layer in range(3):
        x, p = make_inputs(4, 12, seed=layer), make_params(QWEN, seed=layer)
        auxes.append(run_moe(x, p, QWEN, mask_BT=mask)[1])
        logits.append(torch.tensor(np.asarray(x @ p["router"]["kernel"])).reshape(-1, E))
    return jax.tree.map(lambda *x: jnp.stack(x), *auxes), tuple(logits)


@pytest.mark.parametrize("padded", [False, True])
def test_load_balance_is_that_of_transformers(padded):
    mask = jnp.arange(12) < jnp.asarray([[12], [5], [1], [0]]) if padded else None
    torch_mask = torch.tensor(np.asarray(mask)).float() if padded else None
    aux, logits = make_layers(mask)
    expected = load_balancing_loss_func(logits, E, K, torch_mask)
    np.testing.assert_allclose(load_balance_loss(aux, pool_layers=True), expected, rtol=1e-6)
    each = [load_balancing_loss_func((layer,), E, K, torch_mask).item() for layer in logits]
    np.testing.assert_allclose(load_balance_loss(aux), np.mean(each), rtol=1e-6)
    one = jax.tree.map(lambda x: x[0], aux)
    np.testing.assert_allclose(load_balance_loss(one), each[0], rtol=1e-6)
    squares = torch.stack([torch.logsumexp(layer, -1) ** 2 for layer in logits]).numpy()
    rows = np.ones(48, bool) if mask is None else np.asarray(mask).reshape(-1)
    np.testing.assert_allclose(z_loss(aux), squares[:, rows].mean(), rtol=1e-6)


def test_load_balance_of_an_even_and_of_a_collapsed_router():
    config = MoeConfig(num_experts=4, experts_per_token=2, mlp_size=F)
    p = make_params(config)
    even = p | {"router": {"kernel": jnp.zeros((D, 4))}}
    assert load_balance_loss(run_moe(make_inputs(), even, config)[1]) == 2  # k
    x = jnp.ones((1, 8, D))
    collapsed = p | {"router": {"kernel": jnp.zeros((D, 4)).at[:, 0].set(1.0)}}
    assert load_balance_loss(run_moe(x, collapsed, config)[1]) == pytest.approx(4)  # E


def micro_batches(config, mask):
    """Sum and gradient of the router losses of six rows: at once, and two rows at a time."""
    x, p = make_inputs(6, 10), make_params(config)

    def total(p, rows):
        aux = run_moe(x[rows], p, config, mask_BT=mask[rows])[1]
        return router_loss_sum(aux, config), aux.without_routing()

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    whole, parts = run(p, np.arange(6)), [run(p, np.arange(i, i + 2)) for i in (0, 2, 4)]
    return whole, jax.tree.map(lambda *x: sum(x), *parts)


def test_router_losses_add_up_over_micro_batches():
    mask = jnp.arange(10) < jnp.asarray([[10], [3], [7], [10], [1], [0]])
    config = dataclasses.replace(QWEN, load_balance_coef=0.3, z_coef=0.1, load_balance_over="row")
    ((whole, aux), grads), ((total, aux_sum), grads_sum) = micro_batches(config, mask)
    np.testing.assert_allclose(total, whole, rtol=1e-5)
    assert_close(grads_sum["router"]["kernel"], grads["router"]["kernel"], 1e-5)
    assert_trees_close(aux_sum, aux, 1e-6)
    np.testing.assert_allclose(load_balance_loss(aux_sum), load_balance_loss(aux), rtol=1e-6)
    np.testing.assert_allclose(z_loss(aux_sum), z_loss(aux), rtol=1e-6)
    # By the shares of a micro-batch it cannot add up; that is what the choice of the row is for.
    ((whole, _), _), ((total, _), _) = micro_batches(dataclasses.replace(config, load_balance_over="batch"), mask)
    assert abs(total - whole) > 1e-3 * whole


def test_router_loss_is_the_mean_loss_times_the_tokens():
    config = dataclasses.replace(QWEN, load_balance_coef=0.3, z_coef=0.1)
    aux, _ = make_layers()
    expected = 48 * (0.3 * load_balance_loss(aux) + 0.1 * z_loss(aux))
    np.testing.assert_allclose(router_loss_sum(aux, config), expected, rtol=1e-6)
    row = jax.tree.map(lambda x: x[:1], make_inputs(1, 12))
    aux = run_moe(row, make_params(QWEN), QWEN)[1]  # one row: the row is the batch
    by_row = router_loss_sum(aux, dataclasses.replace(config, load_balance_over="row"))
    np.testing.assert_allclose(by_row, router_loss_sum(aux, config), rtol=1e-6)


# Adapters and settings.


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_what_their_merged_kernels_are(family):
    config, activation = FAMILIES[family]
    with jax.enable_x64(True):
        x, p = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (make_inputs(), make_params(config, rank=3)))
        loss = lambda p: (moe_mlp(x, p, config, activation=activation, lora_alpha=2.1)[0] * x).sum()
        found, grads = jax.jit(jax.value_and_grad(loss))(p)
        loss = lambda p: (dense_moe(x, p, config, activation, 0.7) * x).sum()
        expected, expected_grads = jax.jit(jax.value_and_grad(loss))(p)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert_trees_close(grads, expected_grads, 1e-12)


def test_settings_that_do_not_exist_are_refused_by_name():
    x, p = make_inputs(), make_params(QWEN)
    with pytest.raises(ValueError, match="router 'hash': expected one of softmax_topk, topk_softmax"):
        run_moe(x, p, dataclasses.replace(QWEN, router="hash"))
    with pytest.raises(ValueError, match="activation 'relu': expected one of"):
        run_moe(x, p, QWEN, activation="relu")
    with pytest.raises(ValueError, match="back end 'dense': expected one of"):
        run_moe(x, p, dataclasses.replace(QWEN, backend="dense"))
