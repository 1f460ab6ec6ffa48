"""The transformer as a whole: packing, rematerialisation, adapters, cache, program size."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from odd_config import ODD_CONFIG

from postrain.models import transformer
from postrain.models.cache import init_cache
from postrain.models.config import LoraConfig, MoeConfig, RopeConfig
from postrain.models.lora import init_lora, merge_lora
from postrain.models.params import init_params, merge_params, num_params, param_specs, shapes_of
from postrain.objectives.sft import make_sft_loss
from postrain.training.model import Forward
from postrain.types import Batch

CONFIG = dataclasses.replace(
    ODD_CONFIG,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    init_std=0.1,
    rope=RopeConfig(theta=5e3, kind="llama3", factor=4.0, original_max_positions=32),
)
# Every mechanism that is not in the plain one.
PATTERNED = dataclasses.replace(
    ODD_CONFIG,
    num_layers=5,
    layer_windows=(4, 4, 0, 4, 9),
    local_rope=RopeConfig(theta=100.0),
    rope=RopeConfig(theta=5e3, kind="yarn", factor=4.0, original_max_positions=16, attention_factor=1.2),
    attention_softcap=2.0,
    attention_sinks=True,
    logits_softcap=3.0,
    query_multiplier=0.4,
    post_norms=True,
    norm_plus_one=True,
    embed_multiplier=5.7,
    activation="gelu_tanh",
    init_std=0.1,
)
EXPERTS = dataclasses.replace(
    ODD_CONFIG,
    moe=MoeConfig(5, 2, mlp_size=20, router="topk_softmax", router_bias=True, expert_bias=True),
    activation="clamped_swiglu",
    init_std=0.1,
)
CONFIGS = {"plain": CONFIG, "patterned": PATTERNED, "experts": EXPERTS}
LENGTHS = [7, 31, 1, 12, 26]


def make_params(config):
    noisy = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.tree.map(noisy, init_params(config, jax.random.key(0)))  # norms and biases too


@pytest.fixture(scope="module")
def params():
    return make_params(CONFIG)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """Config and parameters."""
    return CONFIGS[request.param], make_params(CONFIGS[request.param])


def make_documents(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, CONFIG.vocab_size, n).astype(np.int32)
    return [(draw(n), draw(n), (rng.random(n) < 0.6).astype(np.float32)) for n in LENGTHS]


def make_batch(rows, documents, length):
    """``rows``: lists of indices of documents."""
    names = "tokens", "targets", "segment_ids", "positions"
    arrays = {name: np.zeros((len(rows), length), np.int32) for name in names}
    arrays["loss_mask"] = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        offset = 0
        for i, index in enumerate(row):
            tokens, targets, mask = documents[index]
            here = b, slice(offset, offset + len(tokens))
            arrays["tokens"][here], arrays["targets"][here], arrays["loss_mask"][here] = tokens, targets, mask
            arrays["segment_ids"][here], arrays["positions"][here] = i + 1, np.arange(len(tokens))
            offset += len(tokens)
    return Batch(**arrays)


def compute_loss_and_gradients(params, batch, config=CONFIG, **compiler_options):
    loss_fn = make_sft_loss(Forward(config, chunk=16).nll)

    def mean(params):
        loss, weight = loss_fn(params, batch, None).losses["sft"]
        return loss / weight

    return jax.jit(jax.value_and_grad(mean), compiler_options=compiler_options)(params)


def assert_same(result, expected, tolerance=1e-5):
    np.testing.assert_allclose(result[0], expected[0], rtol=tolerance)
    for (path, x), y in zip(jax.tree.leaves_with_path(result[1]), jax.tree.leaves(expected[1]), strict=True):
        scale = float(np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("packed", [[[0, 1, 2, 3, 4]], [[4, 0], [1, 3, 2]], [[3, 1], [2], [0, 4]]])
def test_packed_equals_one_document_a_row(model, packed):
    config, params = model
    documents = make_documents()
    alone = make_batch([[i] for i in range(len(LENGTHS))], documents, max(LENGTHS))
    assert_same(
        compute_loss_and_gradients(params, make_batch(packed, documents, sum(LENGTHS) + 3), config),
        compute_loss_and_gradients(params, alone, config),
    )


def test_changing_one_document_changes_nothing_in_another(model):
    config, params = model
    run = jax.jit(lambda b: transformer.compute_hidden(params, config, b.tokens, b.segment_ids, b.positions))
    documents = make_documents()
    changed = [make_documents(seed=1)[i] if i == 1 else d for i, d in enumerate(documents)]
    rows = [[0, 1, 2, 3, 4]]
    first = make_batch(rows, documents, 80)
    x, y = np.asarray(run(first)), np.asarray(run(make_batch(rows, changed, 80)))
    others = (first.segment_ids != 2) & (first.segment_ids > 0)
    np.testing.assert_array_equal(x[others], y[others])
    assert not np.array_equal(x[first.segment_ids == 2], y[first.segment_ids == 2])


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_document_without_loss_leaves_the_gradients_of_the_others_to_the_bit(params, remat):
    """Neighbours in every sum over tokens, it must add exactly zero to them, wherever it stands in the row."""
    # Untied, so that the embedding's gradient is that of the inputs alone.
    config = dataclasses.replace(CONFIG, remat=remat, tie_embeddings=False)
    params = params | {"unembed": {"embedding": params["embed"]["embedding"][::-1]}}
    run = jax.jit(lambda params, batch: compute_loss_and_gradients(params, batch, config))
    for index in (0, 1, 4):
        documents, others = [], [tokens for i, (tokens, _, _) in enumerate(make_documents()) if i != index]
        for seed in (0, 1):
            documents.append(make_documents())
            tokens, targets, mask = make_documents(seed)[index]
            documents[seed][index] = tokens, targets, np.zeros_like(mask)
        first, second = (run(params, make_batch([[0, 1, 2, 3, 4]], some, 80)) for some in documents)
        assert first[0] == second[0] > 0
        for (path, x), y in zip(jax.tree.leaves_with_path(first[1]), jax.tree.leaves(second[1]), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
            assert np.asarray(x).any(), path
        for some, (_, gradients) in zip(documents, (first, second), strict=True):
            own = np.setdiff1d(some[index][0], np.concatenate(others))
            assert own.size and not np.asarray(gradients["embed"]["embedding"])[own].any()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_memory_and_not_a_bit_of_the_result(model, remat):
    """To the bit where the compiler fuses nothing: what is computed again is what was computed."""
    config, params = model
    batch = make_batch([[0, 1, 2, 3, 4]], make_documents(), 80)
    options = {"xla_backend_optimization_level": 0}
    if "fusion_emitters" in os.environ["XLA_FLAGS"]:  # the older ones contract products and sums
        options["xla_cpu_use_fusion_emitters"] = True
    run = lambda config: compute_loss_and_gradients(params, batch, config, **options)
    expected = run(config)
    assert_same(run(dataclasses.replace(config, remat=remat)), expected, 0)


def test_adapters_change_nothing_at_the_start_and_merge_exactly(model):
    base, params = model
    config = dataclasses.replace(base, lora=LoraConfig(rank=3, alpha=7.0, targets=("q", "v", "down")))
    batch = make_batch([[0, 1], [4, 3]], make_documents(), 60)
    run = lambda p: transformer.compute_hidden(p, config, batch.tokens, batch.segment_ids, batch.positions)
    adapters = init_lora(config, jax.random.key(1))
    np.testing.assert_array_equal(run(merge_params(adapters, params)), run(params))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    both = merge_params(adapters, params)
    merged = merge_lora(both, config)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(run(both), run(merged), atol=2e-5)
    assert np.abs(run(both) - run(params)).max() > 0.1
    targets = {"q", "v", "down"}
    layers = adapters["layers"]
    assert set(layers["attention"]) | set(layers["moe" if config.moe else "mlp"]) == targets


def test_a_merge_keeps_the_kernels_dtype_or_takes_another(params):
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=3, alpha=7.0, targets=("q",)))
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapters = jax.tree.map(lambda x: x + 1e-3, init_lora(config, jax.random.key(1)))
    kernel_of = lambda tree: tree["layers"]["attention"]["q"]["kernel"]
    same = kernel_of(merge_lora(merge_params(adapters, base), config))
    wide = kernel_of(merge_lora(merge_params(adapters, base), config, "float32"))
    a, b = (np.asarray(adapters["layers"]["attention"]["q"][name], np.float64) for name in ("lora_a", "lora_b"))
    expected = np.asarray(kernel_of(base), np.float64) + 7.0 / 3 * a @ b
    assert same.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, expected, atol=1e-7)
    np.testing.assert_array_equal(same, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("split", [False, True], ids=["scanned layers", "split layers"])
def test_cached_equals_uncached_with_ragged_rows(model, split):
    config, params = model
    with jax.enable_x64(True):  # the same mathematics: nothing but the rounding of float64 between the two
        compare_cached_and_uncached(dataclasses.replace(config, compute_dtype="float64"), params, split)


def compare_cached_and_uncached(config, params, split):
    lengths = [5, 11, 1]
    rng = np.random.default_rng(0)
    total = max(lengths) + 4
    tokens = rng.integers(0, config.vocab_size, (3, total)).astype(np.int32)
    ones, index = np.ones_like(tokens), np.tile(np.arange(total, dtype=np.int32), (3, 1))
    whole = transformer.compute_hidden(params, config, tokens, ones, index)
    layers = transformer.split_layers(params, config) if split else params
    run = jax.jit(lambda t, p, cache: transformer.compute_hidden_cached(layers, config, t, p, cache))
    prompt = index[:, : max(lengths)]
    prompt_positions = np.where(prompt < np.array(lengths)[:, None], prompt, -1)
    hidden, cache = run(tokens[:, : max(lengths)], prompt_positions, init_cache(config, 3, total + 2, split=split))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], whole[row, :length], atol=1e-12)
    for step in range(4):
        at = np.array(lengths)[:, None] + step
        hidden, cache = run(np.take_along_axis(tokens, at, 1), at.astype(np.int32), cache)
        np.testing.assert_allclose(hidden[:, 0], whole[np.arange(3), at[:, 0]], atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_program_does_not_grow_with_depth(name):
    def num_lines(num_layers):
        windows = (7, 7, 0, 5) * (num_layers // 4) if name == "patterned" else ()
        config = dataclasses.replace(CONFIGS[name], num_layers=num_layers, layer_windows=windows)
        batch = make_batch([[0]], make_documents(), 16)
        hidden = lambda p: transformer.compute_hidden(p, config, batch.tokens, batch.segment_ids, batch.positions).sum()
        text = jax.jit(jax.grad(hidden)).lower(shapes_of(param_specs(config))).as_text()
        return len(text.splitlines())

    assert num_lines(32) == num_lines(4)


def test_padding_of_the_vocabulary_is_never_predicted(params):
    logits = transformer.compute_logits(params, CONFIG, jnp.ones((2, CONFIG.embed_size)))
    assert logits.shape == (2, 320)
    assert (logits[:, CONFIG.vocab_size :] == jnp.finfo(jnp.float32).min).all()
    assert not np.asarray(init_params(CONFIG, jax.random.key(0))["embed"]["embedding"][CONFIG.vocab_size :]).any()


def test_merge_refuses_a_leaf_in_both_trees():
    with pytest.raises(ValueError, match="both trained and frozen"):
        merge_params({"a": {"b": 1}}, {"a": {"b": 2}})
    assert merge_params({"a": {"c": 1}}, {"a": {"b": 2}}) == {"a": {"b": 2, "c": 1}}


def test_number_of_parameters():
    assert num_params(param_specs(dataclasses.replace(CONFIG, num_layers=1))) == 320 * 32 + 32 + (
        32 + 32 * 48 + 48 + 2 * (32 * 24 + 24) + 48 * 32 + 32 + 2 * 12 + 32 + 2 * (32 * 48 + 48) + 48 * 32 + 32
    )


@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("dots", 2), ("full", 3)])
def test_attention_is_computed_again_only_under_full_rematerialisation(params, remat, passes):
    """A pass over the blocks, forward or backward, is one loop of a length known at run time alone: a ``while``."""
    config = dataclasses.replace(CONFIG, remat=remat)
    batch = make_batch([[0, 1, 2, 3, 4]], make_documents(), 80)
    loss = lambda p: transformer.compute_hidden(p, config, batch.tokens, batch.segment_ids, batch.positions).sum()
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert jaxpr.count("cond_jaxpr") == passes


def test_products_of_experts_are_computed_again_only_under_full_rematerialisation():
    """Each is a loop of a length known at run time alone, as attention is."""
    params, batch = make_params(EXPERTS), make_batch([[0, 1, 2, 3, 4]], make_documents(), 80)

    def num_loops(remat):
        config = dataclasses.replace(EXPERTS, remat=remat)
        loss = lambda p: transformer.compute_hidden(p, config, batch.tokens, batch.segment_ids, batch.positions).sum()
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("cond_jaxpr")

    # Forward, and to input and matrix of each: gate, up, down. What comes out of the last one backward does not need.
    assert num_loops("none") == num_loops("dots") == 2 + 3 * 3
    assert num_loops("full") == 3 + 3 * 3 + 2


@pytest.mark.parametrize("kind", ["dense", "DoRA", "experts"])
def test_adapters_add_to_what_rematerialisation_keeps_by_their_rank_alone(kind):
    """An adapted layer's output is kept once, not as the two products that it is the sum of."""
    base = dataclasses.replace(EXPERTS if kind == "experts" else CONFIG, remat="dots")
    # The magnitudes of a layer's last product would need its output, which nothing else does.
    targets = ("q", "k", "v", "o", "gate", "up") if kind == "DoRA" else ("q", "k", "v", "o", "gate", "up", "down")
    lora = LoraConfig(rank=3, alpha=6.0, targets=targets, dora=kind == "DoRA")
    batch = make_batch([[0, 1, 2, 3, 4]], make_documents(), 80)

    def count_kept(config):
        """Numbers that the layers leave for the backward pass, parameters and what is as narrow as a rank aside."""
        params = make_params(dataclasses.replace(config, lora=None))
        if config.lora:
            params = merge_params(init_lora(config, jax.random.key(0), params), params)
        loss = lambda p: transformer.compute_hidden(p, config, batch.tokens, batch.segment_ids, batch.positions).sum()
        residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
        known = {x.shape for x in jax.tree.leaves(params)}
        stacked = [x.shape for x in residuals if x.shape[:1] == (config.num_layers,) and x.shape not in known]
        return sum(math.prod(shape) for shape in stacked if shape[-1] > lora.rank)

    assert count_kept(dataclasses.replace(base, lora=lora)) == count_kept(base) > 0


ROUTED = dataclasses.replace(
    EXPERTS, moe=dataclasses.replace(EXPERTS.moe, load_balance_coef=0.3, z_coef=0.1, load_balance_over="row")
)


def test_router_losses_do_not_depend_on_the_split_into_micro_batches():
    params = make_params(ROUTED)
    rows = [[0, 1], [4, 3], [2], [1, 2, 3]]
    batch = make_batch(rows, make_documents(), 64)
    whole_loss, whole_grads = compute_sums(params, batch)
    parts = [compute_sums(params, jax.tree.map(lambda x, i=i: x[i : i + 2], batch)) for i in (0, 2)]
    loss, grads = jax.tree.map(lambda a, b: a + b, *parts)
    np.testing.assert_allclose(loss["loss"], whole_loss["loss"], rtol=1e-5)
    for name in ("nll", "router_load_balance", "router_z"):
        np.testing.assert_allclose(loss[name], whole_loss[name], rtol=1e-5)
    assert_same((0.0, grads), (0.0, whole_grads))


def test_router_losses_are_what_the_loss_has_more_than_the_nll():
    params, batch = make_params(ROUTED), make_batch([[0, 1], [4, 3]], make_documents(), 64)
    sums, grads = compute_sums(params, batch)
    expected = sums["nll"] + 0.3 * sums["router_load_balance"] + 0.1 * sums["router_z"]
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-6)
    assert sums["router_busiest"] >= float(batch.loss_mask.sum())
    without = dataclasses.replace(ROUTED, moe=EXPERTS.moe)
    router = lambda grads: np.asarray(grads["layers"]["moe"]["router"]["kernel"])
    assert np.abs(router(grads) - router(compute_sums(params, batch, without)[1])).max() > 1e-3


def compute_sums(params, batch, config=ROUTED):
    """Sums of loss and metrics over a batch, and the gradients of the loss sum."""
    loss_fn = make_sft_loss(Forward(config, chunk=16).nll)

    def total(params):
        sums = loss_fn(params, batch, None)
        loss = sums.losses["sft"].total
        return loss, {name: term.total for name, term in sums.metrics.items()} | {"loss": loss}

    grads, sums = jax.jit(jax.grad(total, has_aux=True))(params)
    return sums, grads
