"""Beams against transformers' search, and against the log-likelihood of every sequence by the forward that trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from postrain.errors import UserError
from postrain.models import transformer
from postrain.models.transformer import compute_hidden, compute_logits
from postrain.rollout import beams
from postrain.rollout.beams import search_beams
from postrain.rollout.constraints.trie import build_trie

LENGTHS = (1, 9, 2, 30, 17)
STOPS = (5, 77)


def make_prompts(lengths=LENGTHS, vocab_size=301, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def search_in_torch(torch_model, prompt, num_beams, max_new_tokens, stop_ids, length_penalty):
    with torch.no_grad():
        out = torch_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=300,
            return_dict_in_generate=True,
            output_scores=True,
        )
    return [
        (cut_after_stop(ids.tolist(), stop_ids), score.item())
        for ids, score in zip(out.sequences[:, len(prompt) :], out.sequences_scores, strict=True)
    ]


def cut_after_stop(ids, stop_ids):
    ends = [i for i, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids


@functools.partial(jax.jit, static_argnums=1)
def compute_all_logprobs(params, config, tokens_BT):
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden = compute_hidden(params, config, tokens_BT, jnp.ones_like(tokens_BT), positions)
    return jax.nn.log_softmax(compute_logits(params, config, hidden)[..., : config.vocab_size], axis=-1)


def score_all(model, prompt, sequences):
    """The log-likelihood of each sequence after the prompt, by the forward that trains, without a cache."""
    longest = max(map(len, sequences))
    tokens = np.zeros((len(sequences), len(prompt) + longest), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(prompt) + len(sequence)] = [*prompt, *sequence]
    logprobs = np.asarray(compute_all_logprobs(model.params, model.config, tokens), np.float64)
    return np.array(
        [
            sum(logprobs[row, len(prompt) - 1 + i, token] for i, token in enumerate(sequence))
            for row, sequence in enumerate(sequences)
        ]
    )


# Every fourth id ends a sequence, so that of a random model sequences of many lengths come back.
MANY_STOPS = tuple(range(2, 300, 4))


def check_against_torch(model, num_beams, max_new_tokens, stop_ids, length_penalty):
    """Same sequences, same scores, for ragged prompts. Returns the lengths of the sequences."""
    prompts = make_prompts((1, 9, 30))
    settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
    found = search_beams(model.params, model.config, prompts, stop_ids=stop_ids, **settings)
    lengths = set()
    for prompt, ours in zip(prompts, found, strict=True):
        theirs = search_in_torch(model.torch_model, prompt, stop_ids=stop_ids, **settings)
        assert [beam.tokens for beam in ours] == [tokens for tokens, _ in theirs]
        np.testing.assert_allclose([beam.score for beam in ours], [score for _, score in theirs], atol=1e-4)
        for beam in ours:
            assert beam.finished == (beam.tokens[-1] in stop_ids) and beam.row == -1
            assert beam.score == pytest.approx(beam.logprob / len(beam.tokens) ** length_penalty)
            lengths.add(len(beam.tokens))
    return lengths


def test_beams_are_transformers(model):
    assert len(check_against_torch(model, 3, 12, MANY_STOPS, 1.0)) > 2


@pytest.mark.parametrize("length_penalty", [0.0, 2.0, -1.0])
def test_beams_of_other_length_penalties(llama, length_penalty):
    check_against_torch(llama, 3, 12, MANY_STOPS, length_penalty)


def test_beams_that_never_end_are_cut(llama):
    assert check_against_torch(llama, 4, 7, STOPS, 1.0) == {7}


def make_items(rng, count, length, ragged):
    items = {
        tuple(rng.integers(100, 126, rng.integers(1, length + 1) if ragged else length).tolist()) for _ in range(count)
    }
    return [list(item) for item in sorted(items, key=lambda item: item[::-1])]


@pytest.mark.parametrize(("stop_id", "ragged", "extra"), [(None, False, 0), (5, True, 3)])
def test_a_beam_for_each_item_ranks_all_by_full_log_likelihood(llama, stop_id, ragged, extra):
    model, items = llama, make_items(np.random.default_rng(1), 50, 4, ragged)
    trie = build_trie(items, vocab_size=model.config.vocab_size, stop_id=stop_id)
    whole = [[*item, *([] if stop_id is None else [stop_id])] for item in items]
    prompts = make_prompts()
    found = search_beams(
        model.params, model.config, prompts, num_beams=len(items) + extra, max_new_tokens=trie.depth, trie=trie
    )
    for prompt, ours in zip(prompts, found, strict=True):
        expected = score_all(model, prompt, whole)
        order = np.argsort(-expected, kind="stable")
        assert [beam.row for beam in ours] == order.tolist()
        assert [beam.tokens for beam in ours] == [whole[row] for row in order]
        np.testing.assert_allclose([beam.logprob for beam in ours], expected[order], atol=1e-5)
        assert all(beam.finished for beam in ours)


def test_few_beams_over_a_trie_return_distinct_items(llama):
    """Fewer beams than items: no exact ranking, but items alone, each once, with their exact log-likelihood."""
    items = make_items(np.random.default_rng(2), 400, 4, ragged=False)
    trie = build_trie(items, vocab_size=llama.config.vocab_size)
    prompts = make_prompts()
    found = search_beams(llama.params, llama.config, prompts, num_beams=7, max_new_tokens=4, trie=trie)
    for prompt, ours in zip(prompts, found, strict=True):
        assert len(ours) == len({beam.row for beam in ours}) == 7
        assert [beam.tokens for beam in ours] == [items[beam.row] for beam in ours]
        scores = [beam.logprob for beam in ours]
        np.testing.assert_allclose(scores, score_all(llama, prompt, [items[beam.row] for beam in ours]), atol=1e-5)
        assert scores == sorted(scores, reverse=True)


def test_prompts_do_not_depend_on_each_other(llama):
    """Nor on how many are searched together, nor on the blocks in which logits are computed."""
    prompts = make_prompts((3, 150, 11))
    settings = {"num_beams": 16, "max_new_tokens": 4, "stop_ids": MANY_STOPS}
    together = search_beams(llama.params, llama.config, prompts, **settings)  # 48 rows, in two blocks
    for prompt, ours in zip(prompts[1:], together[1:], strict=True):
        [alone] = search_beams(llama.params, llama.config, [prompt], **settings)
        assert [beam.tokens for beam in ours] == [beam.tokens for beam in alone]
        np.testing.assert_allclose([beam.score for beam in ours], [beam.score for beam in alone], atol=1e-5)
    in_pairs = search_beams(llama.params, llama.config, prompts, batch_size=2, **settings)
    assert [[b.tokens for b in one] for one in in_pairs] == [[b.tokens for b in one] for one in together]


def test_stacked_layers_search_the_same(llama, monkeypatch):
    """The layout of accelerators, where the layers stay in one array."""
    settings = {"num_beams": 3, "max_new_tokens": 12, "stop_ids": MANY_STOPS}
    split = search_beams(llama.params, llama.config, make_prompts(), **settings)
    monkeypatch.setattr(beams, "split_layers", lambda params, config: params)
    stacked = search_beams(llama.params, llama.config, make_prompts(), **settings)
    assert [[b.tokens for b in one] for one in stacked] == [[b.tokens for b in one] for one in split]


def test_banned_ids_and_padding_never_come(llama):
    banned = np.random.default_rng(0).permutation(301)[:280]
    found = search_beams(
        llama.params, llama.config, make_prompts(), num_beams=6, max_new_tokens=5, banned_ids=banned.tolist()
    )
    for prompt, ours in zip(make_prompts(), found, strict=True):
        assert len(ours) == 6
        assert not {token for beam in ours for token in beam.tokens} & {*banned.tolist(), *range(301, 320)}
        # What is left is not renormalised.
        expected = score_all(llama, prompt, [beam.tokens for beam in ours])
        np.testing.assert_allclose([beam.logprob for beam in ours], expected, atol=1e-5)


def test_more_beams_than_the_vocabulary_has_ids(llama):
    [found] = search_beams(llama.params, llama.config, [[1, 2]], num_beams=400, max_new_tokens=1)
    logprobs = np.asarray(compute_all_logprobs(llama.params, llama.config, jnp.array([[1, 2]])))[0, -1]
    assert [beam.tokens for beam in found] == [[token] for token in np.argsort(-logprobs, kind="stable")]


def test_logits_of_a_block_of_rows_at_a_time(llama):
    """40 beams of 4 prompts over 20,000 ids: the program holds the logits of 32 rows, not of 160, let alone twice."""
    config, num_rows, vocab_size = dataclasses.replace(llama.config, vocab_size=20_000), 160, 20_032
    params = transformer.split_layers(llama.params, llama.config)
    params["unembed"] = {"embedding": jax.ShapeDtypeStruct((vocab_size, 40), jnp.float32)}
    cache = beams._make_cache(config, num_rows, 64, True)
    zeros = np.zeros(num_rows, np.int32)
    sizes = {}
    for in_blocks in (True, False):
        arrays = params, cache, zeros, zeros, zeros, None, np.ones(config.vocab_size, bool)
        compiled = beams._step.lower(*arrays, config=config, size=80, in_blocks=in_blocks).compile()
        sizes[in_blocks] = compiled.memory_analysis().temp_size_in_bytes / (num_rows * vocab_size * 4)
    assert sizes[True] < 0.6 and sizes[False] > 0.9, sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[301]]}, "prompt 0 has token id 301, outside the model's vocabulary of 301"),
        ({"num_beams": 0}, "num_beams and max_new_tokens must be at least 1, found 0 and 4"),
        ({"max_new_tokens": 0}, "found 2 and 0"),
        ({"stop_ids": (301,)}, "stop_ids has 301"),
        ({"banned_ids": (-1,)}, "banned_ids has -1"),
        ({"num_beams": 10**9}, r"1,000,000,000 beams of \d+ tokens need [\d,.]+ GB for their keys.*lower num_beams"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"trie": build_trie([[1, 2]], vocab_size=300)}, "the trie is of a vocabulary of 300, the model of 301"),
        (
            {"trie": build_trie([[1] * 5], vocab_size=301)},
            "longest sequence of the trie has 5 ids, max_new_tokens is 4",
        ),
        ({"trie": build_trie([[1, 2]], vocab_size=301), "banned_ids": (2,)}, "the trie has id 2, which is banned"),
    ],
)
def test_searches_that_cannot_be(llama, options, message):
    options = {"prompts": [[1, 2]], "num_beams": 2, "max_new_tokens": 4} | options
    with pytest.raises(UserError, match=message):
        search_beams(llama.params, llama.config, **options)


def test_logits_that_are_not_numbers_stop_the_search(llama):
    broken = jax.tree.map(lambda x: x * jnp.nan, llama.params)
    with pytest.raises(UserError, match="prompt 0: expected finite logits"):
        search_beams(broken, llama.config, [[1, 2]], num_beams=2, max_new_tokens=2)


def test_positions_past_those_of_the_model_are_warned_of(llama):
    config = dataclasses.replace(llama.config, max_positions=4)
    with pytest.warns(UserWarning, match="3 prompt tokens \\+ 2 new ones may pass the 4 positions"):
        search_beams(llama.params, config, [[1], [1, 2, 3]], num_beams=2, max_new_tokens=2)


def test_no_prompts_give_no_beams(llama):
    assert search_beams(llama.params, llama.config, [], num_beams=2, max_new_tokens=2) == []
