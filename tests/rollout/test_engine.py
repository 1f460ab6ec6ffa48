import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_checks import LENGTHS, check_model_logprobs, compute_all_logits, generate_in_torch, make_prompts

from postrain.errors import UserError
from postrain.models import cache as cache_lib
from postrain.models import lora
from postrain.models import params as params_lib
from postrain.models.config import LoraConfig
from postrain.models.transformer import compute_hidden, compute_hidden_cached, split_layers
from postrain.rollout import programs, slots
from postrain.rollout.engine import Engine
from postrain.rollout.programs import bucket
from postrain.rollout.requests import SamplingParams
from postrain.rollout.weights import Weights
from postrain.training.step import count_compilations


def generate(params, config, prompts, sampling=SamplingParams(), *, batch_size=32, **options):
    return Engine(params, config, slots=batch_size).generate(prompts, sampling, **options)


def test_greedy_is_what_transformers_generates(model):
    prompts = make_prompts()
    free = [generate_in_torch(model.torch_model, prompt, 45) for prompt in prompts]
    stop_ids = (free[0][10], free[3][3], free[4][40])
    stopped = [generate_in_torch(model.torch_model, prompt, 45, stop_ids) for prompt in prompts]
    for expected, stops in ((free, ()), (stopped, stop_ids)):
        out = generate(model.params, model.config, prompts, SamplingParams(max_new_tokens=45, stop_ids=stops))
        assert [completion.tokens for completion in out] == expected
        assert [completion.finished for completion in out] == [tokens[-1] in stops for tokens in expected]
    assert len({len(tokens) for tokens in stopped}) > 2  # the stop ids have cut something, at different places


def test_logprobs_are_the_training_forwards(model):
    prompts = make_prompts()
    out = generate(model.params, model.config, prompts, SamplingParams(temperature=0.8, max_new_tokens=20))
    check_model_logprobs(model.params, model.config, prompts, out, 0.8)
    for completion in out:
        np.testing.assert_array_equal(completion.logprobs, completion.model_logprobs)


def test_logprobs_of_a_cut_distribution(llama):
    prompts = make_prompts()
    cut = SamplingParams(temperature=1.2, top_p=0.6, top_k=20, max_new_tokens=20)
    out = generate(llama.params, llama.config, prompts, cut)
    check_model_logprobs(llama.params, llama.config, prompts, out, 1.2)
    for completion in out:
        assert (completion.logprobs >= completion.model_logprobs - 1e-6).all()
        assert completion.logprobs.mean() > completion.model_logprobs.mean() + 0.2  # renormalised over what is kept
    greedy = generate(llama.params, llama.config, prompts, SamplingParams(max_new_tokens=5))
    check_model_logprobs(llama.params, llama.config, prompts, greedy, 1.0)
    for completion in greedy:
        np.testing.assert_array_equal(completion.logprobs, 0)


def test_a_row_does_not_depend_on_its_batch(llama):
    prompts = make_prompts()
    sampling = SamplingParams(temperature=1.0, max_new_tokens=40, seed=3)
    streamed = {row: [] for row in range(len(prompts))}
    whole = generate(llama.params, llama.config, prompts, sampling)
    one_each = generate(llama.params, llama.config, prompts, sampling, batch_size=1)
    four = generate(
        llama.params,
        llama.config,
        prompts,
        sampling,
        batch_size=4,
        until=lambda row: streamed[row].append,
    )
    assert [c.tokens for c in whole] == [c.tokens for c in one_each] == [c.tokens for c in four]
    assert list(streamed.values()) == [c.tokens for c in whole]
    assert generate(llama.params, llama.config, prompts[:1], sampling)[0].tokens == whole[0].tokens
    again = generate(llama.params, llama.config, prompts, dataclasses.replace(sampling, seed=4))
    assert [c.tokens for c in again] != [c.tokens for c in whole]
    same_prompt = generate(llama.params, llama.config, [prompts[1]] * 2, sampling)
    assert same_prompt[0].tokens != same_prompt[1].tokens


def test_seeds_draw_what_the_model_says(llama):
    """First tokens over many rows of one prompt follow the model's probabilities (chi-square)."""
    prompt = make_prompts()[1]
    num_rows = 2048
    out = generate(
        llama.params,
        llama.config,
        [prompt] * num_rows,
        SamplingParams(temperature=0.7, max_new_tokens=1),
        batch_size=num_rows,
    )
    observed = np.bincount([c.tokens[0] for c in out], minlength=llama.config.vocab_size)
    logits = compute_all_logits(llama.params, llama.config, np.array([prompt]))[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 0.7)) * num_rows
    common = expected >= 5
    chi_square = ((observed - expected) ** 2 / expected)[common].sum()
    assert abs(chi_square - common.sum()) < 4 * np.sqrt(2 * common.sum())


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 40])
def test_cached_hidden_states_are_the_uncached_ones(model, split, piece):
    config, length = model.config, max(LENGTHS)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (len(LENGTHS), length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (len(LENGTHS), 1))
    segment_ids = (positions < np.array(LENGTHS)[:, None]).astype(np.int32)
    expected = np.asarray(compute_hidden(model.params, config, tokens, segment_ids, positions))
    params = split_layers(model.params, config) if split else model.params
    cache = cache_lib.init_cache(config, len(LENGTHS), length + 3, split=split)
    step = jax.jit(lambda p, t, q, c: compute_hidden_cached(p, config, t, q, c))
    parts = []
    for start in range(0, length, piece):
        width = slice(start, start + piece)
        hidden, cache = step(params, tokens[:, width], np.where(segment_ids, positions, -1)[:, width], cache)
        parts.append(np.asarray(hidden))
    real = segment_ids > 0
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[real], expected[real], atol=1e-5)
    slots = np.arange(length + 3)
    for layer in cache.k if split else list(cache.k):
        written = np.asarray(jnp.abs(layer).sum((1, 3)) > 0)
        np.testing.assert_array_equal(written, slots < np.array(LENGTHS)[:, None])


def test_adapters_beside_their_kernels(llama):
    config = dataclasses.replace(llama.config, lora=LoraConfig(rank=3))
    adapters = lora.init_lora(config, jax.random.key(0))
    adapters = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.05, adapters)
    params = params_lib.merge_params(adapters, llama.params)
    prompts = make_prompts()
    out = generate(params, config, prompts, SamplingParams(max_new_tokens=12))
    merged = generate(lora.merge_lora(params, config), config, prompts, SamplingParams(max_new_tokens=12))
    assert [c.tokens for c in out] == [c.tokens for c in merged]
    assert [c.tokens for c in out] != [
        c.tokens for c in generate(llama.params, llama.config, prompts, SamplingParams(max_new_tokens=12))
    ]
    check_model_logprobs(params, config, prompts, out, 1.0)


def test_a_model_that_trains_in_float8_generates_without(llama):
    """Its scale is that of a whole tensor: rows would depend on what else is in the batch."""
    config = dataclasses.replace(llama.config, fp8=True)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=12)
    out, plain = (generate(llama.params, one, make_prompts(), sampling) for one in (config, llama.config))
    for one, other in zip(out, plain, strict=True):
        np.testing.assert_array_equal(one.model_logprobs, other.model_logprobs)


def test_stacked_layers_generate_the_same(model, monkeypatch):
    """On accelerators the layers stay stacked under a scan."""
    sampling = SamplingParams(temperature=1.0, max_new_tokens=20)
    split = generate(model.params, model.config, make_prompts(), sampling)
    monkeypatch.setattr(jax, "default_backend", lambda: "accelerator")
    assert Weights(model.params, model.config, 0).tree is model.params
    stacked = generate(model.params, model.config, make_prompts(), sampling)
    assert [c.tokens for c in stacked] == [c.tokens for c in split]


def test_what_prompts_share_is_computed_once(llama, monkeypatch):
    """A common beginning and repeated prompts change the work, not the result."""
    beginning, ends = make_prompts((50,))[0], make_prompts((3, 20, 8), seed=2)
    prompts = [beginning + end for end in (*ends, ends[1], ends[1])] + [beginning]
    sampling = SamplingParams(temperature=1.0, max_new_tokens=15)
    apart = [generate(llama.params, llama.config, [prompt], SamplingParams(max_new_tokens=15))[0] for prompt in prompts]
    sizes, run_piece = [], programs.prefill

    def run_counted(params, cache, tokens, *args, **options):
        sizes.append(tokens.shape)
        return run_piece(params, cache, tokens, *args, **options)

    monkeypatch.setattr(programs, "prefill", run_counted)
    together = generate(llama.params, llama.config, prompts, SamplingParams(max_new_tokens=15))
    assert [c.tokens for c in together] == [c.tokens for c in apart]
    assert sizes == [(1, 64), (4, 32)]  # of 49 shared ones whole blocks; then 4 distinct rows of up to 21 more
    sampled = generate(llama.params, llama.config, prompts, sampling)
    check_model_logprobs(llama.params, llama.config, prompts, sampled, 1.0)
    assert sampled[1].tokens != sampled[3].tokens != sampled[4].tokens
    sizes.clear()
    group = generate(llama.params, llama.config, [prompts[1]] * 6, sampling)
    assert sizes == [(1, 128)]  # 69 of one of them
    check_model_logprobs(llama.params, llama.config, [prompts[1]] * 6, group, 1.0)


def test_a_long_completion_outgrows_its_first_cache(llama, monkeypatch):
    prompts = make_prompts((200, 3, 140))
    with_room = generate(llama.params, llama.config, prompts, SamplingParams(max_new_tokens=150))
    monkeypatch.setattr(slots, "GROWTH", 4)
    assert [c.tokens for c in generate(llama.params, llama.config, prompts, SamplingParams(max_new_tokens=150))] == [
        c.tokens for c in with_room
    ]
    expected = generate_in_torch(llama.torch_model, prompts[0], 150)
    assert with_room[0].tokens == expected


def test_no_recompilation_for_other_prompts_of_similar_sizes(llama):
    sampling = SamplingParams(temperature=0.9, top_p=0.9, max_new_tokens=40, stop_ids=(5,))
    generate(llama.params, llama.config, make_prompts((3, 12, 9)), sampling)
    other = dataclasses.replace(sampling, temperature=0.5, top_p=0.8, max_new_tokens=38, stop_ids=(1, 2), seed=9)
    with count_compilations() as compiled:
        generate(llama.params, llama.config, make_prompts((14, 2, 10), seed=1), other)
    assert not compiled


def test_shapes_come_from_a_short_list():
    assert [bucket(n) for n in (1, 64, 65, 96, 97, 129, 193, 300, 1000)] == [64, 64, 96, 96, 128, 192, 256, 384, 1024]
    assert [bucket(n, 1) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert len({bucket(n) for n in range(1, 100_000)}) < 25


def test_the_callers_parameters_stay_theirs(llama):
    before = jax.tree.map(np.array, llama.params)
    generate(llama.params, llama.config, make_prompts(), SamplingParams(max_new_tokens=3))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, llama.params))


def test_no_prompts_give_no_completions(llama):
    assert generate(llama.params, llama.config, []) == []


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[1, 2], []], "prompt 1 is empty"),
        ([[1, 301]], "prompt 0 has token id 301, outside the model's vocabulary of 301"),
        ([[-1]], "prompt 0 has token id -1"),
    ],
)
def test_prompts_that_cannot_be(llama, prompts, message):
    with pytest.raises(UserError, match=message):
        generate(llama.params, llama.config, prompts)


@pytest.mark.parametrize(
    "option",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}]
    + [{"max_new_tokens": 99999999999}, {"seed": -1}, {"seed": 2**32}],
)
def test_sampling_that_cannot_be(option):
    with pytest.raises(UserError, match=f"sampling.{next(iter(option))} must be .*, found"):
        SamplingParams(**option)


def test_positions_beyond_the_model_are_warned_of(llama):
    config = dataclasses.replace(llama.config, max_positions=16)
    with pytest.warns(UserWarning, match="30 prompt tokens . 2 new ones may pass the 16 positions"):
        out = generate(llama.params, config, make_prompts(), SamplingParams(max_new_tokens=2))
    assert [len(c.tokens) for c in out] == [2] * len(LENGTHS)


def test_logits_that_are_not_numbers_stop_generation(llama):
    broken = llama.params | {"final_norm": {"scale": llama.params["final_norm"]["scale"] * np.nan}}
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0)):
        with pytest.raises(UserError, match="prompt 3: expected finite logits"):
            generate(broken, llama.config, make_prompts(), sampling)


@pytest.mark.parametrize("temperature", [1e-50, 1e-40, 1e39, float("inf"), float("nan"), -1.0])
def test_a_temperature_that_float32_cannot_divide_by_is_refused(temperature):
    with pytest.raises(UserError, match="sampling.temperature must be 0 .greedy., or 1e-6 to 1e6, found"):
        SamplingParams(temperature=temperature)


def test_the_least_temperature_is_as_good_as_greedy(llama):
    prompts = [[3, 5, 7], [11, 2]]
    sampled = generate(llama.params, llama.config, prompts, SamplingParams(temperature=1e-6, max_new_tokens=6))
    greedy = generate(llama.params, llama.config, prompts, SamplingParams(max_new_tokens=6))
    assert [one.tokens for one in sampled] == [one.tokens for one in greedy]
