"""Walks a trie on the device, a batch of states at a time, without Python per row.

As in STATIC (Su et al. 2026, arXiv:2602.22647) the sets of ids of the first levels, which are few and large, are a
table of bits, and those below, which are many and small, are gathered out of the CSR arrays. A state is one int32, so
that a compiled loop of generation carries [B] of them.

Legend: B rows, W words of 32 ids, C children, E edges, V entries of the vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from postrain.rollout.constraints.trie import Trie
from postrain.rollout.sampling import invert_cumulative

DEAD = -1  # the state after an id that is not allowed: nothing may follow
DENSE_BYTES = 2**26  # room for sets of ids as bits
CHUNK = 64  # children whose probabilities are summed at once


@flax.struct.dataclass
class DeviceTrie:
    """A ``Trie`` on the device; made by ``put_trie``."""

    offsets: jax.Array  # int32 [E + 2]
    tokens: jax.Array  # int32 [E]
    dense: jax.Array  # uint32 [nodes of the dense levels, W]: the sets of ids, from word ``first_word`` on
    vocab_size: int = flax.struct.field(pytree_node=False)
    first_word: int = flax.struct.field(pytree_node=False)
    max_children: int = flax.struct.field(pytree_node=False)
    max_sparse: int = flax.struct.field(pytree_node=False)  # the most children of a node that is not dense


def put_trie(trie: Trie, dense_bytes: int = DENSE_BYTES) -> DeviceTrie:
    """``trie`` on the device. Levels are dense from the first on, as long as all fit in ``dense_bytes``."""
    first = int(trie.tokens.min()) // 32
    num_words = int(trie.tokens.max()) // 32 + 1 - first
    # The last level has no children, and needs no table.
    fits = [start for start in trie.level_starts[1:-1].tolist() if start * num_words * 4 <= dense_bytes]
    num_dense = max(fits, default=0)
    dense = np.zeros((num_dense, num_words), np.uint32)
    counts = np.diff(trie.offsets)
    parents = np.repeat(np.arange(num_dense), counts[:num_dense])
    ids = trie.tokens[: len(parents)] - first * 32
    np.bitwise_or.at(dense, (parents, ids >> 5), np.uint32(1) << (ids & 31).astype(np.uint32))
    return DeviceTrie(
        offsets=jnp.asarray(trie.offsets),
        tokens=jnp.asarray(trie.tokens),
        dense=jnp.asarray(dense),
        vocab_size=trie.vocab_size,
        first_word=first,
        max_children=int(counts.max()),
        max_sparse=int(counts[num_dense:].max()),
    )


def trie_children(trie: DeviceTrie, states_B: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The first ``size`` children of each state, in ascending order: (ids, next states), int32 [B, size].

    Both are -1 where there are fewer.
    """
    states = jnp.maximum(states_B, 0)[:, None]
    edges = trie.offsets[states] + jnp.arange(size)
    exists = (edges < trie.offsets[states + 1]) & (states_B >= 0)[:, None]
    ids = trie.tokens[jnp.minimum(edges, trie.tokens.shape[0] - 1)]
    return jnp.where(exists, ids, -1), jnp.where(exists, edges + 1, DEAD)


@jax.jit
def trie_mask(trie: DeviceTrie, states_B: jax.Array) -> jax.Array:
    """The ids that may follow each state, as ``Constraint.allowed``: uint32 [B, ceil(vocab_size / 32)].

    Nothing follows the end of a sequence, nor DEAD.
    """
    num_dense, num_words = trie.dense.shape
    words = jnp.zeros((states_B.shape[0], num_words), jnp.uint32)
    if num_dense:
        rows = trie.dense[jnp.clip(states_B, 0, num_dense - 1)]
        words = jnp.where(((states_B >= 0) & (states_B < num_dense))[:, None], rows, words)
    if trie.max_sparse:
        ids, _ = trie_children(trie, jnp.where(states_B >= num_dense, states_B, DEAD), trie.max_sparse)
        bits = jnp.where(ids >= 0, jnp.uint32(1) << (ids & 31).astype(jnp.uint32), 0)
        places = jnp.where(ids >= 0, (ids >> 5) - trie.first_word, num_words)
        # The ids of a node are distinct, so that adding their bits sets them.
        words = words.at[jnp.arange(len(states_B))[:, None], places].add(bits, mode="drop")
    after = -(-trie.vocab_size // 32) - trie.first_word - num_words
    return jnp.pad(words, ((0, 0), (trie.first_word, after)))


@jax.jit
def trie_advance(trie: DeviceTrie, states_B: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """The states after one more id each, int32 [B]: DEAD where it is not allowed."""
    states = jnp.maximum(states_B, 0)
    low, end = trie.offsets[states], trie.offsets[states + 1]
    high = end
    for _ in range(trie.max_children.bit_length()):  # bisection for the first child that is not below the id
        middle = (low + high) // 2
        is_below = (trie.tokens[jnp.minimum(middle, trie.tokens.shape[0] - 1)] < tokens_B) & (middle < high)
        low, high = jnp.where(is_below, middle + 1, low), jnp.where(is_below, high, middle)
    found = (low < end) & (trie.tokens[jnp.minimum(low, trie.tokens.shape[0] - 1)] == tokens_B) & (states_B >= 0)
    return jnp.where(found, low + 1, DEAD)


@jax.jit
def trie_is_end(trie: DeviceTrie, states_B: jax.Array) -> jax.Array:
    """Whether a sequence ends at each state, so that nothing follows: bool [B]. False for DEAD."""
    states = jnp.maximum(states_B, 0)
    return (states_B >= 0) & (trie.offsets[states] == trie.offsets[states + 1])


@flax.struct.dataclass
class DrawnIds:
    """One more id of every row. All [B].

    Of rows whose path has ended or is DEAD, and of those where the logits of all children are -inf, tokens are -1 and
    the log-probabilities 0. ``trie_is_end`` tells them apart.
    """

    tokens: jax.Array  # int32
    states: jax.Array  # int32, after them; as they were where there is none
    logprobs: jax.Array  # float32, under what was drawn from: the children, renormalised; 0 when greedy
    model_logprobs: jax.Array  # float32, of the whole vocabulary at the temperature; of temperature 1 when greedy


def draw_children(
    trie: DeviceTrie, states_B: jax.Array, logits_BV: jax.Array, uniforms_B2: jax.Array, temperature_B: jax.Array
) -> DrawnIds:
    """Draws one child of each state, for the body of a compiled loop; temperature 0 takes the most probable one.

    Only the logits of children are gathered: no mask of the vocabulary is made. ``logits_BV`` are those of the model,
    with its lowest number past the vocabulary; the uniform numbers in [0, 1) are those of ``sampling.make_uniforms``.
    """
    size = -(-trie.max_children // CHUNK) * CHUNK
    ids, after = trie_children(trie, states_B, size)
    exists = ids >= 0
    greedy_B1 = temperature_B[:, None] == 0
    divisor_B1 = jnp.where(greedy_B1, 1.0, temperature_B[:, None])
    logits = logits_BV.astype(jnp.float32)
    of_children = jnp.where(exists, jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1), -jnp.inf)
    best_B1 = of_children.max(-1, keepdims=True)
    going = best_B1[:, 0] != -jnp.inf  # what is no number goes on, so that it is seen
    best_B1 = jnp.where(going[:, None], best_B1, 0.0)
    weights = jnp.exp((of_children - best_B1) / divisor_B1)
    # In two levels, as in sampling.py: the second number keeps the resolution of improbable children.
    chunks = weights.reshape(weights.shape[0], -1, CHUNK)
    sums = chunks.sum(-1)
    chunk = invert_cumulative(sums, uniforms_B2[:, 0])
    within = invert_cumulative(jnp.take_along_axis(chunks, chunk[:, None, None], axis=1)[:, 0], uniforms_B2[:, 1])
    place = jnp.where(greedy_B1[:, 0], jnp.argmax(of_children, axis=-1), chunk * CHUNK + within)[:, None]
    take = lambda x: jnp.take_along_axis(x, place, axis=-1)[:, 0]
    log_weight = take((of_children - best_B1) / divisor_B1)
    logprobs = jnp.where(greedy_B1[:, 0], 0.0, log_weight - jnp.log(sums.sum(-1)))
    model_logprobs = log_weight - jax.nn.logsumexp((logits - best_B1) / divisor_B1, axis=-1)
    return DrawnIds(
        tokens=jnp.where(going, take(ids), -1),
        states=jnp.where(going, take(after), states_B),
        logprobs=jnp.where(going, logprobs, 0.0),
        model_logprobs=jnp.where(going, model_logprobs, 0.0),
    )
