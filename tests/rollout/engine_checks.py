"""What tests of the engine share: ragged prompts, transformers' greedy answers, the trainer's log-probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from postrain.models.transformer import compute_hidden, compute_logits

LENGTHS = (1, 9, 2, 30, 17, 5)


def make_prompts(lengths=LENGTHS, vocab_size=301, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def generate_in_torch(torch_model, prompt, max_new_tokens, stop_ids=(), **options):
    with torch.no_grad():
        out = torch_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # else it hides ids equal to the padding's
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
            **options,
        )
    return out[0, len(prompt) :].tolist()


@functools.partial(jax.jit, static_argnums=1)
def compute_all_logits(params, config, tokens_BT):
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden = compute_hidden(params, config, tokens_BT, jnp.ones_like(tokens_BT), positions)
    return compute_logits(params, config, hidden)[..., : config.vocab_size]


def score(params, config, prompts, completions, temperature=1.0):
    """log softmax(logits / temperature) of every token of the completions, by the forward that trains."""
    tokens = np.zeros((len(prompts), 96), np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens[row, : len(prompt) + len(completion.tokens)] = list(prompt) + completion.tokens
    logprobs = np.asarray(jax.nn.log_softmax(compute_all_logits(params, config, tokens) / temperature, axis=-1))
    found = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        steps = len(prompt) - 1 + np.arange(len(completion.tokens))
        found.append(logprobs[row, steps])
    return found


def check_model_logprobs(params, config, prompts, completions, temperature):
    for completion, logprobs in zip(completions, score(params, config, prompts, completions, temperature), strict=True):
        own = np.take_along_axis(logprobs, np.array(completion.tokens)[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(completion.model_logprobs, own, atol=1e-5)
