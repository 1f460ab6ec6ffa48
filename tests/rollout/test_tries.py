"""The trie's arrays against a trie of dictionaries: on the host, on the device, and what cannot be built."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain.rollout.constraints import WrongConstraint, unpack_ids
from postrain.rollout.constraints.device_trie import (
    DEAD,
    draw_children,
    put_trie,
    trie_advance,
    trie_is_end,
    trie_mask,
)
from postrain.rollout.constraints.trie import build_trie
from postrain.rollout.sampling import make_uniforms

VOCAB = 1000


def make_sequences(rng, count, longest, low=300, high=420, ragged=False):
    """Distinct random sequences; ragged ones may begin one another."""
    made = {
        tuple(rng.integers(low, high, rng.integers(1, longest + 1) if ragged else longest).tolist())
        for _ in range(count)
    }
    sequences = sorted(made)
    return [sequences[i] for i in rng.permutation(len(sequences))]


def make_nested(sequences, stop_id):
    root = {}
    for sequence in sequences:
        node = root
        for token in [*sequence, *([] if stop_id is None else [stop_id])]:
            node = node.setdefault(token, {})
    return root


def walk(sequences, stop_id, trie, visit):
    """Calls ``visit(path, state, allowed ids)`` for every node."""

    def go(node, path, state):
        visit(path, state, sorted(node))
        for token, child in node.items():
            index = int(np.searchsorted(trie.children(state), token))
            go(child, (*path, token), int(trie.offsets[state]) + index + 1)

    go(make_nested(sequences, stop_id), (), 0)


CASES = [(400, 4, False, None), (300, 5, True, 7), (1, 1, False, None), (1, 3, True, 999), (60, 1, False, None)]


@pytest.mark.parametrize(("count", "longest", "ragged", "stop_id"), CASES)
def test_the_arrays_are_the_trie(count, longest, ragged, stop_id):
    sequences = make_sequences(np.random.default_rng(count), count, longest, ragged=ragged)
    trie = build_trie(sequences, vocab_size=VOCAB, stop_id=stop_id)
    assert trie.num_sequences == len(sequences)
    assert trie.depth == max(map(len, sequences)) + (stop_id is not None)
    seen = []

    def visit(path, state, allowed):
        assert trie.children(state).tolist() == allowed
        if not allowed:
            row = trie.rows[state]
            assert [*sequences[row], *([] if stop_id is None else [stop_id])] == list(path)
            seen.append(row)
        else:
            assert trie.rows[state] == -1

    walk(sequences, stop_id, trie, visit)
    assert sorted(seen) == list(range(len(sequences)))


@pytest.mark.parametrize("dense_bytes", [0, 100, 3000, 2**26])
@pytest.mark.parametrize(("count", "longest", "ragged", "stop_id"), CASES)
def test_the_device_walks_as_the_host_does(count, longest, ragged, stop_id, dense_bytes):
    """However many of its levels are tables of bits."""
    sequences = make_sequences(np.random.default_rng(count), count, longest, ragged=ragged)
    trie = build_trie(sequences, vocab_size=VOCAB, stop_id=stop_id)
    device = put_trie(trie, dense_bytes)
    assert device.dense.nbytes <= dense_bytes
    states = np.arange(-1, len(trie.rows))
    words = np.asarray(trie_mask(device, jnp.asarray(states)))
    assert words.shape == (len(states), -(-VOCAB // 32)) and words.dtype == np.uint32
    assert not words[0].any()  # DEAD
    for state, allowed in zip(states[1:], words[1:], strict=True):
        assert unpack_ids(allowed).tolist() == trie.children(state).tolist()
    ends = np.asarray(trie_is_end(device, jnp.asarray(states)))
    assert ends.tolist() == [False, *(trie.rows >= 0).tolist()]
    rng = np.random.default_rng(0)
    from_states = rng.integers(-1, len(trie.rows), 3000)
    tokens = np.where(
        rng.random(3000) < 0.5, trie.tokens[rng.integers(0, len(trie.tokens), 3000)], rng.integers(0, VOCAB, 3000)
    )
    hits = np.asarray(trie_advance(device, jnp.asarray(from_states), jnp.asarray(tokens)))
    for state, token, found in zip(from_states, tokens, hits, strict=True):
        children = trie.children(state).tolist() if state >= 0 else []
        expected = int(trie.offsets[state]) + children.index(token) + 1 if token in children else DEAD
        assert found == expected


def test_a_shared_pair_of_ids_is_no_path():
    """Ids that follow each other in some sequence are not allowed to in another (a table of pairs would allow them)."""
    trie = build_trie([(1, 2, 3), (8, 2, 9)], vocab_size=VOCAB)
    constraint = trie.constraint()
    for token in (1, 2):
        constraint.advance(token)
    assert unpack_ids(constraint.allowed()).tolist() == [3]
    with pytest.raises(ValueError, match="id 9 is not allowed"):
        constraint.advance(9)


def check_random_walks(trie, sequences, rng, count):
    known = {tuple(sequence): row for row, sequence in enumerate(sequences)}
    for _ in range(count):
        constraint, path = trie.constraint(), []
        while not constraint.is_done():
            path.append(int(rng.choice(unpack_ids(constraint.allowed()))))
            constraint.advance(path[-1])
        assert not constraint.allowed().any()
        assert known[tuple(path)] == trie.rows[constraint.state]


def test_random_walks_end_at_sequences():
    rng = np.random.default_rng(0)
    sequences = make_sequences(rng, 2000, 4)
    check_random_walks(build_trie(sequences, vocab_size=VOCAB), sequences, rng, 300)


@pytest.mark.slow
def test_ten_thousand_walks():
    rng = np.random.default_rng(1)
    sequences = np.unique(rng.integers(0, 256, (200_000, 4)), axis=0) + np.arange(4) * 256 + 151_000
    trie = build_trie(sequences, vocab_size=152_064)
    check_random_walks(trie, sequences.tolist(), rng, 10_000)


def test_walks_within_a_compiled_loop():
    """Rows draw from the sets of the device, step by step, in one program: all end at sequences."""
    rng = np.random.default_rng(0)
    sequences = make_sequences(rng, 500, 4, ragged=True)
    trie = build_trie(sequences, vocab_size=VOCAB, stop_id=0)
    device = put_trie(trie, dense_bytes=2000)

    @jax.jit
    def draw(key):
        def step(states, key):
            words = trie_mask(device, states)
            allowed = (words[:, jnp.arange(VOCAB) // 32] >> (jnp.arange(VOCAB) % 32).astype(jnp.uint32)) & 1
            tokens = jax.random.categorical(key, jnp.where(allowed > 0, 0.0, -jnp.inf))
            going = ~trie_is_end(device, states)
            return jnp.where(going, trie_advance(device, states, tokens), states), jnp.where(going, tokens, -1)

        return jax.lax.scan(step, jnp.zeros(256, jnp.int32), jax.random.split(key, trie.depth))

    states, tokens = map(np.asarray, draw(jax.random.key(0)))
    for row, path in zip(trie.rows[states], tokens.T, strict=True):
        assert path[path >= 0].tolist() == [*sequences[row], 0]


@pytest.mark.parametrize("stop_id", [None, 0])
def test_children_are_drawn_as_the_model_says(stop_id):
    """In one compiled loop: as often as the renormalised probabilities say, with the log p of the whole vocabulary."""
    rng = np.random.default_rng(0)
    sequences = make_sequences(rng, 12, 3, low=300, high=304)
    trie = build_trie(sequences, vocab_size=VOCAB, stop_id=stop_id)
    device, num_rows, temperature = put_trie(trie), 20_000, 0.7
    logits = rng.normal(size=VOCAB).astype(np.float32) * 2  # the same after every path
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(num_rows))

    @jax.jit
    def draw(temperatures):
        def step(states, position):
            uniforms = make_uniforms(keys, jnp.full(num_rows, position))
            one = draw_children(device, states, jnp.broadcast_to(logits, (num_rows, VOCAB)), uniforms, temperatures)
            return one.states, (one.tokens, one.logprobs, one.model_logprobs)

        return jax.lax.scan(step, jnp.zeros(num_rows, jnp.int32), jnp.arange(trie.depth + 1))

    half = np.arange(num_rows) < num_rows // 2  # the others greedy
    states, (tokens, logprobs, model_logprobs) = jax.tree.map(
        np.asarray, draw(np.where(half, np.float32(temperature), 0))
    )
    rows = trie.rows[states]
    assert (rows >= 0).all() and len(set(rows[~half])) == 1 and (tokens[-1] == -1).all()
    log_p = lambda scaled: scaled - np.log(np.exp(scaled).sum())
    expected, model = np.zeros(len(sequences)), np.zeros(len(sequences))
    for row, sequence in enumerate(sequences):
        state = 0
        for token in [*sequence, *([] if stop_id is None else [stop_id])]:
            children = trie.children(state)
            place = int(np.searchsorted(children, token))
            expected[row] += log_p(logits[children] / temperature)[place]
            model[row] += log_p(logits / temperature)[token]
            state = int(trie.offsets[state]) + place + 1
    np.testing.assert_allclose(logprobs.sum(0)[half], expected[rows[half]], atol=1e-5)
    np.testing.assert_allclose(model_logprobs.sum(0)[half], model[rows[half]], atol=1e-4)
    assert not logprobs[:, ~half].any()
    counts, share = np.bincount(rows[half], minlength=len(sequences)), np.exp(expected)
    assert np.abs(counts / half.sum() - share).max() < 5 * np.sqrt(share.max() / half.sum())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_children_without_probability_are_not_drawn(temperature):
    trie = put_trie(build_trie([(1, 2), (3, 4)], vocab_size=VOCAB))
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:2, [1, 3]] = -np.inf  # row 0 is at the beginning, row 1 after 1
    logits[3] = np.nan
    states = jnp.array([0, 1, DEAD, 0])
    drawn = draw_children(trie, states, jnp.asarray(logits), jnp.full((4, 2), 0.5), jnp.full(4, temperature))
    assert np.asarray(drawn.tokens)[:3].tolist() == [-1, 2, -1]
    assert np.asarray(drawn.states)[[0, 2]].tolist() == [0, DEAD]
    for values in (drawn.logprobs, drawn.model_logprobs):
        assert np.isfinite(np.asarray(values)[:3]).all() and not np.asarray(values)[[0, 2]].any()
    assert np.isnan(np.asarray(drawn.model_logprobs)[3])


def test_tables_of_bits_are_made_in_their_own_size():
    sequences = np.stack([np.arange(3000), np.arange(3000) * 7 % 3000, np.zeros(3000, int)], axis=1)
    trie = build_trie(sequences, vocab_size=3000)
    tracemalloc.start()
    device = put_trie(trie)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert device.dense.nbytes > 2_000_000 and peak < 2 * device.dense.nbytes


def test_matrices_and_lists_give_the_same_trie():
    sequences = make_sequences(np.random.default_rng(3), 100, 4)
    ours = build_trie(sequences, vocab_size=VOCAB)
    for other in (np.array(sequences), np.array(sequences, np.int32), [list(map(np.int64, one)) for one in sequences]):
        trie = build_trie(other, vocab_size=VOCAB)
        assert all(
            (getattr(trie, name) == getattr(ours, name)).all() for name in ("offsets", "tokens", "rows", "level_starts")
        )


@pytest.mark.parametrize(
    ("sequences", "stop_id", "message"),
    [
        ([], None, "at least one sequence, found none"),
        (np.zeros((0, 4), int), None, "at least one sequence"),
        ([(1, 2), (), (3,)], None, "row 1 is empty"),
        (np.zeros((2, 0), int), None, "row 0 is empty"),
        ([(1, 2), (1, VOCAB)], None, f"row 1 has id {VOCAB}, outside the vocabulary of {VOCAB}"),
        ([(1, 2), (-1, 4)], 5, "row 1 has id -1"),
        ([(1, 2), (3, 4), (1, 2)], None, "row 2 is the same sequence as row 0: 1 2"),
        ([(1, 2), (3, 4), (1, 2)], 5, "row 2 is the same sequence as row 0"),
        ([(1, 2, 3), (4,), (1, 2)], None, r"row 2 is the beginning of row 0 \(1 2\).*give a stop_id"),
        ([(1,), (1, 0)], None, "row 0 is the beginning of row 1"),
        ([(1, 5, 3), (4,)], 5, "row 0 has the stop id 5 inside"),
        ([(1, 2)], VOCAB, "the stop id 1000 is outside"),
        ([(1, 2.5)], None, "no whole number"),
        ([(1, True)], None, "no whole number"),
        (np.array([[1.0, 2.0]]), None, "no whole number"),
        (np.array([1, 2]), None, r"expected sequences of ids, found array\(\[1, 2\]\)"),
        ([1, 2], None, r"expected sequences of ids, found \[1, 2\]"),
        (3, None, "expected sequences of ids, found 3"),
    ],
)
def test_tries_that_cannot_be(sequences, stop_id, message):
    with pytest.raises(WrongConstraint, match=f"trie: .*{message}"):
        build_trie(sequences, vocab_size=VOCAB, stop_id=stop_id)


def test_one_prefix_among_many_is_found():
    """Also where rows that share the beginning lie between the two when sorted."""
    rng = np.random.default_rng(0)
    sequences = make_sequences(rng, 3000, 4)
    where = 1234
    sequences.insert(where, sequences[2000][:2])
    with pytest.raises(WrongConstraint, match=f"row {where} is the beginning of row"):
        build_trie(sequences, vocab_size=VOCAB)
    build_trie(sequences, vocab_size=VOCAB, stop_id=1)
