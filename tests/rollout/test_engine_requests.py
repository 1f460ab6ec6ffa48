"""Requests come and go: what each is given depends on itself, its seed and the weights alone."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_checks import check_model_logprobs, compute_all_logits, generate_in_torch, make_prompts, score

from postrain.errors import UserError
from postrain.models import lora, quantized
from postrain.models.config import LoraConfig
from postrain.models.params import merge_params
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams
from postrain.training.step import count_compilations

SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=12)


def run(engine, handles=None):
    """The completions that come until nothing is left: by handle, or those of ``handles`` in order."""
    found = {}
    while not engine.is_idle:
        for event in engine.step():
            if event.completion is not None:
                found[event.handle] = event.completion
    return found if handles is None else [found[handle] for handle in handles]


def change(params, scale=1.3):
    """Other weights of the same model."""
    return jax.tree.map(lambda x: x * scale, params)


def test_a_row_depends_on_seed_and_sample_id_alone(llama):
    """Not on its slot, how many there are, the order, the others of its group, or how it goes through the cache."""
    prompts = make_prompts((3, 40, 9))
    reference = Engine(llama.params, llama.config).generate(prompts, SAMPLED, n=4)
    assert len({tuple(one.tokens) for one in reference}) == 12
    one_each = Engine(llama.params, llama.config).generate(prompts, SAMPLED)
    assert [one.tokens for one in one_each] == [reference[4 * i].tokens for i in range(3)]
    engine = Engine(llama.params, llama.config, slots=3, steps=5, fill_first=False, prefix_bytes=0)
    handles = {}
    for index in np.random.default_rng(0).permutation(12).tolist():
        other = dataclasses.replace(SAMPLED, max_new_tokens=4 + index)  # rows come and go at different times
        handles[engine.submit(prompts[index // 4], other, sample_id=index // 4 + (index % 4 << 32))] = index
        engine.submit(prompts[0], dataclasses.replace(SAMPLED, seed=index, temperature=2.0, top_k=5))
    found = run(engine)
    for handle, index in handles.items():
        shared = min(12, 4 + index)
        assert found[handle].tokens[:shared] == reference[index].tokens[:shared]
        np.testing.assert_allclose(found[handle].logprobs[:shared], reference[index].logprobs[:shared], atol=1e-5)


def test_nothing_is_compiled_after_a_warm_up(llama):
    """Over mixed lengths, ways of sampling, sizes of groups, turns of conversations and requests that are cancelled."""
    rng = np.random.default_rng(0)
    engine = Engine(llama.params, llama.config, slots=2, min_rows=2, min_positions=128, keep_answers=True)
    kinds = (
        {},
        {"temperature": 0.7},
        {"temperature": 1.2, "top_k": 7, "stop_ids": (3, 9)},
        {"temperature": 0.4, "top_p": 0.8, "min_p": 0.01, "ignore_eos": True},
        {"temperature": 0.4, "banned_ids": (5, 6)},
        {"banned_ids": (5, 6), "min_new_tokens": 1, "stop_ids": tuple(range(100, 130))},
        {"temperature": 1.0, "stop_ids": tuple(range(270, 302 - 1))},
        {"repetition_penalty": 1.2, "logit_bias": {3: 1.0}, "temperature": 2.0},
        {"top_logprobs": 3, "prompt_logprobs": True},
    )

    def load(count):
        for _ in range(count):
            sampling = SamplingParams(max_new_tokens=int(rng.integers(1, 40)), **kinds[rng.integers(len(kinds))])
            prompt = rng.integers(0, 301, rng.integers(1, 60)).tolist()
            for sample in range(rng.integers(1, 6)):
                engine.submit(prompt, dataclasses.replace(sampling, seed=sample), sample_id=sample)
        return run(engine)

    def talk(turns):
        """Every turn begins with the last one and its answer."""
        prompt, cached = rng.integers(0, 301, 20).tolist(), []
        for turn in range(turns):
            sampling = SamplingParams(max_new_tokens=9, **kinds[turn % len(kinds)])
            [answer] = engine.generate([prompt], dataclasses.replace(sampling, prompt_logprobs=False))
            cached.append(answer.cached_tokens)
            prompt = [*prompt, *answer.tokens, 5, 6]
        return cached

    engine.warm_up()
    with count_compilations() as compiled:
        found = load(12)
        cached = talk(8)
        handle = engine.submit([1, 2, 3], SAMPLED)
        while not engine.num_running:
            engine.step()
        engine.cancel(handle)
    assert len(found) > 12 and cached[0] == 0 and min(cached[1:]) > 20 and not compiled


def test_a_prompt_seen_before_is_not_computed_again_until_the_weights_change(llama):
    [prompt] = make_prompts((70,))
    longer = prompt + make_prompts((9,), seed=1)[0]
    engine = Engine(llama.params, llama.config)
    [cold] = engine.generate([prompt], SAMPLED)
    [warm] = engine.generate([prompt], SAMPLED)
    [further] = engine.generate([longer], SAMPLED)
    assert (cold.cached_tokens, warm.cached_tokens, further.cached_tokens) == (0, 69, 69)
    assert warm.tokens == cold.tokens
    np.testing.assert_allclose(warm.logprobs, cold.logprobs, atol=1e-5)
    assert further.tokens == Engine(llama.params, llama.config).generate([longer], SAMPLED)[0].tokens
    group = engine.generate([longer[::-1]], SAMPLED, n=3)
    assert [one.cached_tokens for one in group] == [0, 78, 78]

    changed = change(llama.params)
    assert engine.update_weights(changed, version=1) < 1e-4
    [after] = engine.generate([prompt], SAMPLED)
    assert after.cached_tokens == 0 and after.tokens != cold.tokens
    assert after.tokens == Engine(changed, llama.config).generate([prompt], SAMPLED)[0].tokens
    check_model_logprobs(changed, llama.config, [prompt], [after], 1.0)
    assert set(cold.versions) == {0} and set(after.versions) == {1}


def test_an_answer_is_what_the_next_turn_begins_with(llama):
    [prompt] = make_prompts((20,))
    engine = Engine(llama.params, llama.config, keep_answers=True)
    [answer] = engine.generate([prompt], SAMPLED)
    turn = prompt + answer.tokens + [5, 6, 7]
    [second] = engine.generate([turn], SAMPLED)
    assert second.cached_tokens == 20 + 12 - 1
    check_model_logprobs(llama.params, llama.config, [turn], [second], 1.0)


def test_the_prefix_store_stays_within_its_bytes(llama):
    engine = Engine(llama.params, llama.config, prefix_bytes=100_000)
    for prompt in make_prompts((70,) * 9):
        engine.generate([prompt], SamplingParams(max_new_tokens=1))
    assert 0 < engine.prefixes.num_bytes <= 100_000
    assert engine.prefixes.num_bytes == sum(x.nbytes for e in engine.prefixes for x in jax.tree.leaves(e.cache))
    [last] = make_prompts((70,) * 9)[-1:]
    assert engine.generate([last], SamplingParams(max_new_tokens=1))[0].cached_tokens == 69


@pytest.mark.parametrize("caches", ["recompute", "keep", "abort"])
def test_weights_change_in_mid_answer(llama, caches):
    """Two spans of versions that meet at the right token, each with the log-probabilities of its weights."""
    prompts, changed = make_prompts((9, 17)), change(llama.params)
    engine = Engine(llama.params, llama.config, steps=5)
    handles = [engine.submit(prompt, SAMPLED, sample_id=i) for i, prompt in enumerate(prompts)]
    before = []
    while len(before) < 2:
        before = engine.step()
    assert [len(event.tokens) for event in before] == [5, 5]
    engine.update_weights(changed, version=3, caches=caches)
    found = run(engine)
    completions = [found[handle] for handle in handles]
    if caches == "abort":
        assert [(one.finish, len(one.tokens)) for one in completions] == [("abort", 5)] * 2
        return
    for one, event in zip(completions, before, strict=True):
        assert one.versions.tolist() == [0] * 5 + [3] * 7
        assert one.tokens[:5] == event.tokens
    old, new = (score(params, llama.config, prompts, completions) for params in (llama.params, changed))
    for one, by_old, by_new in zip(completions, old, new, strict=True):
        index = np.arange(12), one.tokens
        np.testing.assert_allclose(one.model_logprobs[:5], by_old[index][:5], atol=1e-5)
        difference = np.abs(one.model_logprobs[5:] - by_new[index][5:]).max()
        assert (
            difference < 1e-5 if caches == "recompute" else difference > 1e-3
        )  # kept keys and values are the old ones


def test_other_weights_than_were_given_are_found(llama):
    """An update that reads adapters alone cannot take a new base over: the probe says so."""
    config = dataclasses.replace(llama.config, lora=LoraConfig(rank=3))
    fresh = lora.init_lora(config, jax.random.key(0))
    trained = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.05, fresh)
    engine = Engine(merge_params(fresh, llama.params), config)
    assert engine.update_weights(merge_params(trained, llama.params), version=1) < 1e-5
    prompts = make_prompts()
    out = engine.generate(prompts, SAMPLED)
    check_model_logprobs(merge_params(trained, llama.params), config, prompts, out, 1.0)
    other = merge_params(trained, change(llama.params))
    with pytest.raises(UserError, match="log-probabilities of a probe differ from the trainer's by .*base_changed"):
        engine.update_weights(other, version=2)
    assert engine.update_weights(other, version=3, base_changed=True) < 1e-4
    with pytest.raises(ValueError, match="version 3: expected more than 3"):
        engine.update_weights(other, version=3)


@pytest.mark.parametrize("dora", [False, True])
def test_a_small_update_of_adapters_is_not_lost_in_bfloat16(llama, dora):
    """Merged into a base in bfloat16 it would be rounded away."""
    config = dataclasses.replace(llama.config, lora=LoraConfig(rank=2, dora=dora), compute_dtype="bfloat16")
    base = jax.tree.map(lambda x: x.astype("bfloat16"), llama.params)
    adapters = lora.init_lora(config, jax.random.key(0), base)
    small = jax.tree.map(lambda x: x + 2e-3 * jax.random.normal(jax.random.key(1), x.shape), adapters)
    params = merge_params(small, base)
    engine = Engine(merge_params(adapters, base), config)
    engine.update_weights(params, version=1)
    prompts = make_prompts((8, 20))
    out = engine.generate(prompts, SamplingParams(temperature=1.0, max_new_tokens=24))
    moved, noise = [], []
    options = config, prompts, out
    for one, ours, without in zip(
        out, score(params, *options), score(merge_params(adapters, base), *options), strict=True
    ):
        index = np.arange(len(one.tokens)), one.tokens
        noise.append(one.model_logprobs - ours[index])
        moved.append(without[index] - ours[index])
    noise, moved = np.concatenate(noise), np.concatenate(moved)
    assert np.abs(noise).mean() < 0.25 * np.abs(moved).mean()


def test_adapters_on_a_quantised_base(llama):
    """The base is dequantised once, the adapters stay beside it: numbers of the forward that trains."""

    def quantize(tree):
        items = ((k, quantize(v) if isinstance(v, dict) else v) for k, v in tree.items())
        return {k: quantized.quantize(v, "int8") if k == "kernel" else v for k, v in items}

    config = dataclasses.replace(llama.config, lora=LoraConfig(rank=2, dora=True))
    base = llama.params | {"layers": quantize(llama.params["layers"])}
    adapters = lora.init_lora(config, jax.random.key(0), base)
    adapters = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), adapters)
    params, prompts = merge_params(adapters, base), make_prompts((8, 20))
    engine = Engine(params, config)
    check_model_logprobs(params, config, prompts, engine.generate(prompts, SAMPLED), 1.0)
    assert engine.update_weights(params, version=1) < 1e-5


def test_a_thousand_cancelled_requests_leave_every_slot_free(llama):
    rng = np.random.default_rng(0)
    engine = Engine(llama.params, llama.config, slots=4, min_rows=4, fill_first=False)
    prompts = make_prompts((3, 20, 9))
    kept = engine.submit(prompts[1], SAMPLED, sample_id=1)
    live, done = [], {}
    for i in range(1000):
        live.append(engine.submit(prompts[i % 3], SamplingParams(temperature=1.0, max_new_tokens=300, seed=i)))
        if i % 20 == 0:
            done |= {event.handle: event.completion for event in engine.step() if event.completion}
        if len(live) > 6:
            ended = engine.cancel(live.pop(rng.integers(len(live))))
            assert ended is None or ended.finish == "abort" and len(ended.versions) == len(ended.tokens)
    for handle in live:
        engine.cancel(handle)
    assert engine.cancel(10**6) is None
    done |= run(engine)
    assert done[kept].tokens == Engine(llama.params, llama.config).generate(prompts[:2], SAMPLED)[1].tokens
    assert engine.is_idle and engine.slots.num_free == 4 and engine.slots.cache is None


def test_a_row_that_is_not_finite_ends_alone(llama):
    """And whoever has its slot next sees nothing of it."""
    table, greedy = llama.params["embed"]["embedding"], SamplingParams(max_new_tokens=6)
    config = dataclasses.replace(llama.config, tie_embeddings=False)
    params = llama.params | {"unembed": llama.params.get("unembed", {"embedding": table})}
    prompts = make_prompts((5, 9, 6, 8))
    whole = Engine(params, config).generate(prompts, greedy)
    bad = min(
        set(range(301)) - {token for prompt in prompts for token in prompt} - {t for o in whole for t in o.tokens}
    )
    broken = params | {"embed": {"embedding": table.at[bad].set(np.nan)}}
    engine = Engine(broken, config, slots=2, min_rows=2)
    order = [1, 2, bad, 3], prompts[0], [bad], *prompts[1:]
    found = run(engine, [engine.submit(prompt, greedy) for prompt in order])
    assert [one.finish for one in found] == ["error", "length", "error", "length", "length", "length"]
    assert [found[i].tokens for i in (1, 3, 4, 5)] == [one.tokens for one in whole]


def test_penalties_are_those_of_transformers(llama):
    prompts = make_prompts((9, 17))
    for penalty in (1.4, 0.8):
        sampling = SamplingParams(max_new_tokens=20, repetition_penalty=penalty)
        out = Engine(llama.params, llama.config).generate(prompts, sampling)
        expected = [generate_in_torch(llama.torch_model, one, 20, repetition_penalty=penalty) for one in prompts]
        assert [one.tokens for one in out] == expected
        check_model_logprobs(llama.params, llama.config, prompts, out, 1.0)


def test_counts_of_penalties_go_on_from_call_to_call(llama):
    """A large penalty: no id twice, however the answer is cut into calls; a bias chooses and forbids."""
    once = SamplingParams(max_new_tokens=40, presence_penalty=1e4)
    for steps in (7, 32):
        [out] = Engine(llama.params, llama.config, steps=steps).generate([[1, 2]], once)
        assert len(set(out.tokens)) == 40
    favoured = SamplingParams(temperature=1.0, max_new_tokens=20, logit_bias={5: 50.0, 9: 50.0, 7: -1e6})
    plain = SamplingParams(max_new_tokens=20)
    out = Engine(llama.params, llama.config).generate([[1, 2], [1, 2]], [favoured, plain])
    assert set(out[0].tokens) <= {5, 9}
    assert out[1].tokens == generate_in_torch(llama.torch_model, [1, 2], 20)
    with pytest.raises(UserError, match="prompt 0: sampling.logit_bias has id 301, outside"):
        Engine(llama.params, llama.config).generate([[1]], SamplingParams(logit_bias={301: 1.0}))


def test_no_stop_before_its_time(llama):
    [free] = Engine(llama.params, llama.config).generate([[1, 2]], SamplingParams(max_new_tokens=30))
    stop = free.tokens[3]
    sampling = SamplingParams(max_new_tokens=30, stop_ids=(stop,))
    [out] = Engine(llama.params, llama.config).generate([[1, 2]], sampling)
    assert (len(out.tokens), out.finish) == (free.tokens.index(stop) + 1, "stop")
    later = dataclasses.replace(sampling, min_new_tokens=20)
    [out] = Engine(llama.params, llama.config).generate([[1, 2]], later)
    assert stop not in out.tokens[:20] and len(out.tokens) >= 20


def test_logprobs_of_prompts_and_of_the_best_ids(llama):
    prompts = make_prompts((150, 20))
    sampling = SamplingParams(temperature=0.7, max_new_tokens=6, top_logprobs=5, prompt_logprobs=True)
    plain = dataclasses.replace(sampling, prompt_logprobs=False, top_logprobs=2)
    out = Engine(llama.params, llama.config).generate([*prompts, prompts[0]], [sampling, sampling, plain])
    assert out[2].prompt_logprobs is None and out[2].top_logprobs.ids.shape == (6, 2)
    for prompt, one in zip(prompts, out, strict=False):
        whole = np.array([[*prompt, *one.tokens]])
        logits = np.asarray(compute_all_logits(llama.params, llama.config, whole))[0, :-1]
        of_prompt = np.asarray(jax.nn.log_softmax(logits[: len(prompt) - 1], axis=-1))
        assert np.isnan(one.prompt_logprobs[0])
        own = of_prompt[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(one.prompt_logprobs[1:], own, atol=1e-5)
        best = np.argsort(-of_prompt, axis=-1, kind="stable")[:, :5]
        np.testing.assert_array_equal(one.prompt_top_logprobs.ids, best)
        after = np.asarray(jax.nn.log_softmax(logits[len(prompt) - 1 :] / 0.7, axis=-1))
        best = np.argsort(-after, axis=-1, kind="stable")[:, :5]
        np.testing.assert_array_equal(one.top_logprobs.ids, best)
        values = np.take_along_axis(after, best, axis=-1)
        np.testing.assert_allclose(one.top_logprobs.logprobs, values, atol=1e-5)
        is_best = one.top_logprobs.ids == np.array(one.tokens)[:, None]  # the same float, as a client compares them
        assert (one.top_logprobs.logprobs[is_best] == one.model_logprobs[is_best.any(-1)]).all()


class Alternating:
    """Even ids, then odd ones; ``length`` in all; nothing where ``length`` is 0."""

    def __init__(self, length, vocab_size):
        self.tokens, self.length, self.vocab_size = [], length, vocab_size

    def allowed(self):
        may = np.arange(self.vocab_size) % 2 == len(self.tokens) % 2
        may &= self.length > 0
        return np.packbits(np.pad(may, (0, -len(may) % 32)), bitorder="little").view("<u4")

    def advance(self, token):
        self.tokens.append(token)

    def is_done(self):
        return len(self.tokens) == self.length


def test_a_constraint_binds_its_row_alone(llama):
    engine = Engine(llama.params, llama.config)
    hot = SamplingParams(temperature=5.0, max_new_tokens=30)
    constraint = Alternating(9, 301)
    bound = engine.submit([1, 2], hot, constraint=constraint)
    free = engine.submit([1, 2], hot, sample_id=1)
    stuck = engine.submit([1, 2], hot, constraint=Alternating(0, 301))
    found = run(engine)
    assert found[bound].tokens == constraint.tokens and found[bound].finish == "stop"
    assert [token % 2 for token in constraint.tokens] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert found[stuck].finish == "error" and not found[stuck].tokens
    assert found[free].tokens == Engine(llama.params, llama.config).generate([[1], [1, 2]], hot)[1].tokens
    assert (found[bound].kept_mass < 0.9).all() and (found[free].kept_mass == 1).all()
