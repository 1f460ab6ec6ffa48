"""What goes wrong ends the request that it belongs to: others, and whoever has its slot next, see nothing of it."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_checks import check_model_logprobs, make_prompts

from postrain.errors import UserError
from postrain.rollout import programs
from postrain.rollout.constraints import pack_ids
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams

SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=8)
BROKEN = 300  # the id whose row of the table is NaN


class OneOf:
    """Always one of ``ids``; never at its end. ``fails``: the method that raises from the third token on."""

    def __init__(self, ids, fails=""):
        self.words, self.fails, self.count = pack_ids(np.array(ids), 301), fails, 0

    def allowed(self):
        return self._raise("allowed") or self.words

    def advance(self, token):
        self.count += 1
        self._raise("advance")

    def is_done(self):
        return False

    def _raise(self, name):
        if name == self.fails and self.count > 1:
            raise KeyError(f"no state for {name}")


def run(engine):
    found = {}
    while not engine.is_idle:
        found |= {event.handle: event.completion for event in engine.step() if event.completion}
    return found


@pytest.fixture(scope="module")
def broken(llama):
    table = np.array(llama.params["embed"]["embedding"])
    table[BROKEN] = np.nan
    return llama.params | {"embed": {"embedding": jax.numpy.asarray(table)}}


def test_a_kept_answer_does_not_share_the_cache_that_goes_on(llama):
    """One row of the cache is as long as an entry of the store: the store needs one of its own."""
    [first, second] = make_prompts((20, 9))
    engine = Engine(llama.params, llama.config, slots=1, keep_answers=True)
    handle = engine.submit(first, SAMPLED)
    engine.submit(second, SAMPLED, sample_id=1)
    answer = run(engine)[handle]
    turn = [*first, *answer.tokens, 5]
    [out] = engine.generate([turn], SAMPLED)
    assert out.cached_tokens == 27
    check_model_logprobs(llama.params, llama.config, [turn], [out], 1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_holds_whatever_else_is_asked(llama, temperature):
    stops = (7, 9)
    wants = {
        "stops": (OneOf(stops), {"stop_ids": stops, "min_new_tokens": 5}),  # the constraint wins
        "waits": (OneOf((7, 8)), {"stop_ids": stops, "min_new_tokens": 5}),
        "banned": (OneOf((3, 4)), {"banned_ids": (3, 4, 5)}),
        "both": (OneOf((3, 7)), {"banned_ids": (3, 7), "stop_ids": stops, "min_new_tokens": 5}),
        "free": (None, {"banned_ids": tuple(range(9, 301)), "stop_ids": tuple(range(9)), "min_new_tokens": 2}),
        "well": (None, {}),
    }
    engine = Engine(llama.params, llama.config)
    handles = {}
    for name, (constraint, options) in wants.items():
        sampling = SamplingParams(temperature=temperature, max_new_tokens=8, **options)
        handles[engine.submit([1, 2], sampling, constraint=constraint)] = name
    found = {handles[handle]: one for handle, one in run(engine).items()}
    assert len(found["stops"].tokens) == 1 and found["stops"].tokens[0] in stops and found["stops"].finish == "stop"
    assert found["waits"].tokens[:5] == [8] * 5 and set(found["waits"].tokens) <= {7, 8}
    for name in ("banned", "both", "free"):
        assert (found[name].finish, found[name].tokens) == ("error", []), name
        assert "no id is left" in str(found[name].error)
    assert found["well"].finish == "length" and found["well"].error is None


def test_nan_of_a_request_reaches_no_other(llama, broken):
    """Neither by its slot, nor by what the prefix store has of it."""
    beginning, other, short = make_prompts((40, 60, 5), vocab_size=BROKEN)
    bad = [*beginning, BROKEN, *other[:20]]
    good = {"shared": [*beginning, 5, 6], "short": short, "other": other}
    expected = {
        name: Engine(llama.params, llama.config).generate([prompt], SAMPLED)[0] for name, prompt in good.items()
    }
    for cancels in (False, True):
        for prefix_bytes in (0, 2**28):
            engine = Engine(broken, llama.config, slots=1, keep_answers=True, prefix_bytes=prefix_bytes)
            for name, prompt in good.items():
                handle = engine.submit(bad, SAMPLED)
                waiting = engine.submit(prompt, SAMPLED)
                if cancels:
                    while not engine.num_running:
                        engine.step()
                    engine.cancel(handle)
                found = run(engine)
                assert cancels or found[handle].finish == "error"
                assert found[waiting].tokens == expected[name].tokens, (name, cancels, prefix_bytes)
                assert np.isfinite(found[waiting].model_logprobs).all()


def test_nan_after_the_end_is_no_error(llama, broken):
    """The device goes on until the host has seen a token that ends the answer."""
    engine = Engine(broken, llama.config, keep_answers=True)
    sampling = SamplingParams(max_new_tokens=9, logit_bias={BROKEN: 1e4})
    ended = engine.submit([1, 2], sampling, until=lambda token: True)
    goes_on = engine.submit([1, 2], sampling)
    found = run(engine)
    assert (found[ended].tokens, found[ended].finish, found[ended].error) == ([BROKEN], "stop", None)
    assert (found[goes_on].tokens, found[goes_on].finish) == ([BROKEN], "error")
    assert "found NaN" in str(found[goes_on].error)


def test_a_common_beginning_of_nan_is_not_computed_for_ever(llama, broken):
    beginning = [BROKEN, *make_prompts((50,), vocab_size=BROKEN)[0]]
    engine = Engine(broken, llama.config)
    handles = [engine.submit([*beginning, end], SAMPLED) for end in (1, 2)]
    for _ in range(9):
        engine.step()
    assert engine.is_idle, handles


def test_an_exception_in_mid_step_leaves_an_engine_that_can_be_reset(llama, monkeypatch):
    beginning = make_prompts((50,))[0]
    prompts = [[*beginning, 1], [*beginning, 2]]
    expected = Engine(llama.params, llama.config).generate(prompts, SAMPLED)
    for name in ("prefill", "decode"):
        engine = Engine(llama.params, llama.config)

        def fail(params, cache, *args, **options):
            jax.tree.map(lambda x: x.delete(), cache)  # as a call that donates it does
            raise RuntimeError("RESOURCE_EXHAUSTED")

        with monkeypatch.context() as patch:
            patch.setattr(programs, name, fail)
            with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
                engine.generate(prompts, SAMPLED)
        assert engine.is_idle
        assert [one.tokens for one in engine.generate(prompts, SAMPLED)] == [one.tokens for one in expected]

        handles = [engine.submit([3, *prompt], SAMPLED) for prompt in prompts]
        with monkeypatch.context() as patch:
            patch.setattr(programs, name, fail)
            with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
                run(engine)
        if name == "prefill":  # nothing of it is lost: what was to be filled waits again
            assert engine.num_waiting == 2 and sorted(run(engine)) == handles
        engine.reset()
        assert engine.is_idle and not len(engine.prefixes)
        assert [one.tokens for one in engine.generate(prompts, SAMPLED)] == [one.tokens for one in expected]


@pytest.mark.parametrize("fails", ["allowed", "advance", "until"])
def test_what_a_caller_raises_ends_its_own_row(llama, fails):
    def until(token):
        raise KeyError("no state for until")

    engine = Engine(llama.params, llama.config)
    options = {"until": until} if fails == "until" else {"constraint": OneOf(range(301), fails)}
    bad = engine.submit([1, 2], SAMPLED, **options)
    good = engine.submit([1, 2], SAMPLED, sample_id=1)
    found = run(engine)
    assert found[bad].finish == "error" and f"no state for {fails}" in str(found[bad].error)
    assert len(found[bad].tokens) == {"allowed": 2, "advance": 2, "until": 1}[fails]
    assert found[good].tokens == Engine(llama.params, llama.config).generate([[1], [1, 2]], SAMPLED)[1].tokens
    narrow = OneOf([1])
    narrow.words = narrow.words[:3]
    handle = engine.submit([1, 2], SAMPLED, constraint=narrow)
    assert "a constraint for 301 ids gave (3,) words" in str(run(engine)[handle].error)
    if fails == "until":
        with pytest.raises(KeyError, match="no state for until"):
            engine.generate([[1, 2]], SAMPLED, until=lambda index: until)
        assert engine.is_idle


@pytest.mark.parametrize("ids", [[2**32 + 5], [3.7], ["3"], [2**70], [True]])
def test_ids_that_would_become_others_are_refused(llama, ids):
    engine = Engine(llama.params, llama.config)
    with pytest.raises(UserError, match="the prompt"):
        engine.submit(ids)
    with pytest.raises(UserError, match="prompt 0"):
        engine.generate([ids])


@pytest.mark.parametrize("name", ["stop_ids", "banned_ids", "logit_bias"])
@pytest.mark.parametrize("token", [301, -1, 2**40])
def test_settings_with_ids_outside_the_vocabulary_are_refused(llama, name, token):
    value = {token: 1.0} if name == "logit_bias" else (5, token)
    with pytest.raises(UserError, match=f"prompt 0: sampling.{name} has id {token}, outside the model's vocabulary"):
        Engine(llama.params, llama.config).generate([[1]], SamplingParams(**{name: value}))


def test_settings_whose_ids_are_no_integers_are_refused():
    for options in ({"stop_ids": (3.7,)}, {"banned_ids": ("3",)}, {"logit_bias": {1.5: 2.0}}):
        with pytest.raises(UserError, match="sampling.* must be .*found"):
            SamplingParams(**options)
    with pytest.raises(UserError, match="sampling.stop_ids must be at most 32 ids, found 33"):
        SamplingParams(stop_ids=tuple(range(33)))


def test_weights_that_were_refused_are_not_taken_over(llama):
    """Answers under way go on as if nothing had been asked."""
    prompts = make_prompts((9, 40))
    expected = Engine(llama.params, llama.config).generate(prompts, SAMPLED)
    engine = Engine(llama.params, llama.config, steps=3)
    handles = [engine.submit(prompt, SAMPLED, sample_id=i) for i, prompt in enumerate(prompts)]
    while not engine.step():
        pass
    wrong = jax.tree.map(lambda x: x * np.nan, llama.params)
    with pytest.raises(UserError, match="differ"):
        engine.update_weights(wrong, version=1, caches="abort")
    assert engine.version == 0 and len(engine.prefixes)
    found = run(engine)
    assert [found[handle].tokens for handle in handles] == [one.tokens for one in expected]
    assert {int(v) for one in found.values() for v in one.versions} == {0}


def test_two_calls_draw_different_samples_where_they_are_told(llama):
    engine = Engine(llama.params, llama.config)
    whole = engine.generate([[1, 2]] * 4, SAMPLED)
    parts = [engine.generate([[1, 2]] * 2, SAMPLED, first_sample=first) for first in (0, 2)]
    assert [one.tokens for part in parts for one in part] == [one.tokens for one in whole]
    assert whole[0].tokens != whole[2].tokens


def test_a_caller_that_leaves_after_an_update_leaves_nothing_behind(llama):
    engine = Engine(llama.params, llama.config)
    lengths = [dataclasses.replace(SAMPLED, max_new_tokens=length) for length in (2, 60)]
    for _ in engine.iterate([[1, 2], [3, 4]], lengths):
        engine.update_weights(llama.params, version=1, caches="abort")
        break
    assert engine.is_idle
    assert len(engine.generate([[1, 2]], SAMPLED)) == 1
