"""Beams against transformers' search, and against the log-likelihood of every sequence by the forward that trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from postrain.models.transformer import compute_hidden, compute_logits

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


def make_stops_likely(model, monkeypatch, bonus=4.0):
    """Both sides add ``bonus`` to the logits of STOPS, so that sequences end at different lengths."""
    raise NotImplementedError


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
