import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain.rollout.sampling import (
    Edits,
    Filters,
    choose,
    choose_greedy,
    find_threshold,
    invert_cumulative,
    make_uniforms,
)

EDGES = (0.0, 1.0 - 2.0**-24, 0.5)


def softmax(x):
    x = np.asarray(x, np.float64)
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def keep_reference(logits, temperature, top_k, top_p):
    """Which ids of one row are kept: by sorting, in float64, ties with the last one kept too."""
    logits = np.asarray(logits, np.float64)
    keep = np.ones(len(logits), bool)
    if top_k:
        keep &= logits >= np.sort(logits)[-top_k]
    probs = softmax(logits / temperature) * keep
    probs /= probs.sum()
    descending = np.sort(probs)[::-1]
    least = descending[np.argmax(np.cumsum(descending) >= top_p - 1e-12)]
    return keep & (probs >= least)


def pack(may, rows=1):
    """Bits of a bool array [V] for every row, as ``allowed_BW``."""
    words = np.pad(may, (0, -len(may) % 32)).reshape(-1, 32) @ (1 << np.arange(32, dtype=np.uint64))
    return np.tile(words.astype(np.uint32), (rows, 1))


def choose_alike(logits, uniforms, *, vocab_size, temperature, top_k=0, top_p=1.0, min_p=0.0, may=None, **options):
    """``choose`` with the same settings for all rows."""
    rows = logits.shape[0]
    fill = lambda value, dtype: jnp.full(rows, value, dtype)
    filters = Filters(fill(top_k, jnp.int32), fill(top_p, jnp.float32), fill(min_p, jnp.float32))
    allowed = None if may is None else pack(may, rows)
    options |= {"filters": filters if top_k or top_p < 1 or min_p else None, "allowed_BW": allowed}
    return choose(logits, uniforms, fill(temperature, jnp.float32), vocab_size=vocab_size, **options)


def sample_many(logits, num_samples, seed=0, **options):
    """Ids drawn from one row of logits with independent uniforms."""
    uniforms = jax.random.uniform(jax.random.key(seed), (num_samples, 2))
    one = jax.jit(lambda u: choose_alike(jnp.asarray(logits)[None], u[None], **options))
    return jax.lax.map(one, uniforms, batch_size=500)


@pytest.mark.parametrize("size, vocab_size", [(64, 64), (320, 301), (77, 70), (512, 512)])
def test_frequencies_are_the_probabilities(size, vocab_size):
    logits = np.random.default_rng(size).standard_normal(size).astype(np.float32) * 2
    logits[vocab_size:] = 50  # never to be seen, however probable
    choice = sample_many(logits, 20_000, vocab_size=vocab_size, temperature=0.7)
    tokens = np.asarray(choice.tokens).ravel()
    assert tokens.max() < vocab_size
    probs = softmax(logits[:vocab_size] / 0.7)
    expected = probs * len(tokens)
    common = expected >= 5
    observed = np.bincount(tokens, minlength=vocab_size)
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], max(expected[~common].sum(), 1e-9))
    degrees = common.sum()
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)
    np.testing.assert_allclose(np.asarray(choice.model_logprobs).ravel(), np.log(probs[tokens]), atol=2e-6)


def test_banned_ids_are_never_drawn_and_the_models_own_probability_counts_them():
    logits = np.random.default_rng(0).standard_normal(77).astype(np.float32) * 2
    may = ~np.isin(np.arange(70), [3, 40, 69])
    allowed = np.flatnonzero(may)
    logits[:70][~may] = 6.0  # more probable than any other
    choice = sample_many(logits, 20_000, vocab_size=70, temperature=0.7, may=may)
    tokens = np.asarray(choice.tokens).ravel()
    assert set(tokens) <= set(allowed)
    whole, cut = np.log(softmax(logits[:70] / 0.7)), np.full(70, -np.inf)
    cut[allowed] = np.log(softmax(logits[allowed] / 0.7))
    np.testing.assert_allclose(np.asarray(choice.logprobs).ravel(), cut[tokens], atol=2e-6)
    np.testing.assert_allclose(np.asarray(choice.model_logprobs).ravel(), whole[tokens], atol=1e-5)
    counts = np.bincount(tokens, minlength=70)
    assert abs(counts - np.exp(cut) * len(tokens)).max() < 5 * math.sqrt(len(tokens) * np.exp(cut).max())

    best = int(allowed[logits[allowed].argmax()])
    greedy = choose_greedy(jnp.asarray(logits)[None], vocab_size=70, allowed_BW=pack(may))
    assert greedy.tokens.tolist() == [best]
    np.testing.assert_allclose(greedy.model_logprobs, np.log(softmax(logits[:70]))[best], atol=1e-5)
    # So cold that the probabilities of all others are 0 beside those that are banned.
    cold = sample_many(logits, 10, vocab_size=70, temperature=1e-6, may=may, top_k=5, top_p=0.9)
    assert set(np.asarray(cold.tokens).ravel()) == {best} and np.isfinite(cold.model_logprobs).all()


def test_nothing_changes_where_all_ids_may_be_chosen():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((50, 77)), jnp.float32) * 3
    uniforms = jax.random.uniform(jax.random.key(0), (50, 2))
    for draw in (
        lambda may: choose_greedy(logits, vocab_size=70, allowed_BW=None if may is None else pack(may, 50)),
        lambda may: choose_alike(logits, uniforms, vocab_size=70, temperature=1.3, top_p=0.9, may=may),
    ):
        before, after = draw(None), draw(np.ones(70, bool))
        np.testing.assert_array_equal(before.tokens, after.tokens)
        np.testing.assert_array_equal(before.logprobs, after.logprobs)
        np.testing.assert_allclose(before.model_logprobs, after.model_logprobs, atol=1e-6)
        np.testing.assert_allclose(before.kept_mass, after.kept_mass, rtol=1e-5)


def test_every_uniform_gives_the_token_of_the_inverse_cumulative():
    weights = np.random.default_rng(0).random((1, 9)).astype(np.float32)
    uniforms = np.linspace(0, 1, 400, endpoint=False, dtype=np.float32)
    drawn = jax.vmap(lambda u: invert_cumulative(jnp.asarray(weights), u[None])[0])(uniforms)
    cumulative = np.cumsum(weights[0].astype(np.float64))
    expected = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    near = np.abs(cumulative[:, None] - uniforms * cumulative[-1]).min(0) < 1e-6
    np.testing.assert_array_equal(np.asarray(drawn)[~near], expected[~near])


@pytest.mark.parametrize("first", EDGES)
@pytest.mark.parametrize("second", EDGES)
def test_impossible_tokens_are_never_chosen(first, second):
    rng = np.random.default_rng(1)
    logits = np.full((64, 1024), -np.inf, np.float32)
    possible = [rng.choice(1024, size=count + 1, replace=False) for count in range(64)]
    for row, ids in enumerate(possible):
        logits[row, ids] = rng.standard_normal(len(ids)) * 5
    uniforms = np.tile(np.float32([first, second]), (64, 1))
    choice = choose_alike(jnp.asarray(logits), jnp.asarray(uniforms), vocab_size=1000, temperature=1.0)
    for row, token in enumerate(np.asarray(choice.tokens)):
        assert token < 1000
        assert token in possible[row] or not (possible[row] < 1000).any()
    real = [(ids < 1000).any() for ids in possible]
    assert np.isfinite(np.asarray(choice.logprobs)[real]).all()


def test_the_ends_of_the_unit_interval_give_the_first_and_the_last_token():
    weights = jnp.asarray([[0.0, 0.0, 3.0, 0.0, 1.0, 0.0]])
    assert invert_cumulative(weights, jnp.float32([EDGES[0]])) == 2
    assert invert_cumulative(weights, jnp.float32([EDGES[1]])) == 4
    assert invert_cumulative(weights, jnp.float32([1.0])) == 4  # beyond the interval: still a possible one


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("tied", [False, True])
def test_top_k_and_top_p_keep_what_sorting_keeps(top_k, top_p, tied):
    logits = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32) * 3
    if tied:
        logits = np.round(logits)
    expected = np.stack([keep_reference(row, 1.3, min(top_k, 256), top_p) for row in logits])
    probs = softmax(logits / 1.3)
    kept_probs = np.where(expected, probs, 0) / np.where(expected, probs, 0).sum(-1, keepdims=True)
    seen = np.zeros_like(expected)
    options = {"vocab_size": 256, "temperature": 1.3, "top_k": top_k, "top_p": top_p}
    draw = jax.jit(lambda u: choose_alike(jnp.asarray(logits), u, **options))
    for uniforms in jax.random.uniform(jax.random.key(7), (200, 4, 2)):
        choice = draw(uniforms)
        tokens = np.asarray(choice.tokens)
        rows = np.arange(4)
        seen[rows, tokens] = True
        assert expected[rows, tokens].all()
        np.testing.assert_allclose(choice.logprobs, np.log(kept_probs[rows, tokens]), atol=3e-6)
        np.testing.assert_allclose(choice.model_logprobs, np.log(probs[rows, tokens]), atol=3e-6)
        np.testing.assert_allclose(choice.kept_mass, (probs * expected).sum(-1), rtol=1e-5)
    assert seen[kept_probs > 0.1].all()


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e4])
def test_threshold_is_exact(spread):
    rng = np.random.default_rng(5)
    values = (rng.standard_normal((6, 200)) * spread).astype(np.float32)
    values[0, :50] = values[0, 0]
    values[1] = np.round(values[1])
    values[2] = -0.0
    values[3] = 0.0
    for count in (1, 2, 50, 199, 200):
        targets = jnp.full(6, count, jnp.float32)
        found = find_threshold(jnp.asarray(values), jnp.ones_like(values), targets)
        np.testing.assert_array_equal(found, np.sort(values, -1)[:, -count])


def test_greedy_is_argmax_and_takes_the_lowest_of_ties():
    logits = np.random.default_rng(6).integers(0, 4, (20, 320)).astype(np.float32)
    logits[:, 310:] = 9
    choice = choose_greedy(jnp.asarray(logits), vocab_size=310)
    tokens = logits[:, :310].argmax(-1)
    np.testing.assert_array_equal(choice.tokens, tokens)
    np.testing.assert_array_equal(choice.logprobs, 0)
    expected = np.log(softmax(logits[:, :310])[np.arange(20), tokens])
    np.testing.assert_allclose(choice.model_logprobs, expected, atol=1e-6)


def test_a_row_draws_the_same_numbers_in_any_company():
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(3), row))(jnp.arange(5))
    positions = jnp.array([7, 7, 8, 9, 7])
    together = make_uniforms(keys, positions)
    alone = jnp.concatenate([make_uniforms(keys[i : i + 1], positions[i : i + 1]) for i in range(5)])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together)) == 10


def test_rows_of_every_kind_stand_in_one_batch():
    """Each draws what it draws alone: greedy, of the whole distribution, and with each of the filters."""
    logits = np.random.default_rng(8).standard_normal((7, 320)).astype(np.float32) * 3
    uniforms = np.random.default_rng(9).random((7, 2)).astype(np.float32)
    temperatures = [0, 1, 0.5, 1, 1, 2, 0]
    settings = [{}, {}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.7, "min_p": 0.01}, {}]
    filters = Filters(
        np.array([one.get("top_k", 0) for one in settings], np.int32),
        np.array([one.get("top_p", 1) for one in settings], np.float32),
        np.array([one.get("min_p", 0) for one in settings], np.float32),
    )
    together = choose(logits, uniforms, np.float32(temperatures), vocab_size=310, filters=filters, tops=4)
    for row, (temperature, setting) in enumerate(zip(temperatures, settings, strict=True)):
        own = slice(row, row + 1)
        if temperature == 0:
            alone = choose_greedy(logits[own], vocab_size=310, tops=4)
            assert together.tokens[row] == logits[row, :310].argmax()
        else:
            options = {"vocab_size": 310, "temperature": temperature, "tops": 4, **setting}
            alone = choose_alike(jnp.asarray(logits[own]), uniforms[own], **options)
        for name in ("tokens", "logprobs", "model_logprobs", "kept_mass", "top_ids", "top_logprobs"):
            np.testing.assert_allclose(getattr(together, name)[row], getattr(alone, name)[0], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_large_bias_takes_no_digit_from_the_models_logprobs(greedy):
    """The edited logits are far from the model's own, in both directions, and the temperature makes more of it."""
    logits = np.random.default_rng(5).standard_normal((2, 64)).astype(np.float32) * 0.01
    bias, zeros = np.zeros((2, 64), np.float32), np.zeros(2, np.int32)
    bias[0, 7], bias[1] = 1e4, -1e4
    nothing, ones = np.zeros((2, 64), bool), np.ones(2, np.float32)
    edits = Edits(bias, nothing.astype(np.int32), nothing, nothing, zeros, zeros, ones, 0 * ones, 0 * ones)
    temperature = 1.0 if greedy else 0.01
    if greedy:
        choice = choose_greedy(logits, vocab_size=60, edits=edits, tops=5)
    else:
        uniforms, cold = jnp.full((2, 2), 0.5), jnp.full(2, temperature)
        choice = choose(logits, uniforms, cold, vocab_size=60, edits=edits, tops=5)
    own = np.log(softmax(np.float64(logits[:, :60]) / temperature))
    assert choice.tokens[0] == 7
    np.testing.assert_allclose(choice.model_logprobs, own[np.arange(2), choice.tokens], atol=1e-5)
    best = np.take_along_axis(own, np.asarray(choice.top_ids), axis=-1)
    np.testing.assert_allclose(choice.top_logprobs, best, atol=1e-5)


def test_min_p_keeps_a_share_of_the_best():
    logits = np.random.default_rng(3).standard_normal((1, 128)).astype(np.float32) * 2
    choice = sample_many(logits[0], 4000, vocab_size=128, temperature=1.5, min_p=0.1)
    probs = softmax(logits[0] / 1.5)
    kept = np.flatnonzero(probs >= 0.1 * probs.max())
    assert set(np.asarray(choice.tokens).ravel()) == set(kept) and len(kept) > 3
    np.testing.assert_allclose(choice.kept_mass, probs[kept].sum(), rtol=1e-5)


def test_edits_are_what_their_formulas_say():
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((3, 64)).astype(np.float32) * 2
    counts = rng.integers(0, 3, (3, 50)).astype(np.int32)
    prompt, stops = rng.random((3, 50)) < 0.2, rng.random((3, 50)) < 0.1
    bias = rng.standard_normal((3, 50)).astype(np.float32)
    repetition, presence, frequency = np.float32([1.3, 1, 0.7]), np.float32([0, 0.5, 0]), np.float32([0, 0.25, -0.4])
    length, minimum = np.int32([3, 3, 3]), np.int32([0, 4, 3])
    edits = Edits(bias, counts, prompt, stops, length, minimum, repetition, presence, frequency)
    expected = np.float64(logits)
    for row in range(3):
        for i in range(50):
            x = logits[row, i] + bias[row, i]
            if counts[row, i] or prompt[row, i]:
                x = x / repetition[row] if x > 0 else x * repetition[row]
            x -= presence[row] * (counts[row, i] > 0) + frequency[row] * counts[row, i]
            expected[row, i] = -1e38 if stops[row, i] and length[row] < minimum[row] else x
    found = edits.apply(jnp.asarray(logits))
    np.testing.assert_allclose(np.maximum(found, -1e38), expected, rtol=1e-5, atol=1e-5)
    choice = choose_greedy(logits, vocab_size=50, edits=edits)
    np.testing.assert_array_equal(choice.tokens, expected[:, :50].argmax(-1))
    own = np.log(softmax(logits[:, :50]))[np.arange(3), choice.tokens]
    np.testing.assert_allclose(choice.model_logprobs, own, atol=1e-5)  # the model's own, as no edit is part of it
    after = jax.tree.map(jnp.asarray, edits).count(jnp.int32([7, -1, 7]))
    np.testing.assert_array_equal(np.asarray(after.counts_BV)[:, 7] - counts[:, 7], [1, 0, 1])
    np.testing.assert_array_equal(after.length, [4, 3, 4])
