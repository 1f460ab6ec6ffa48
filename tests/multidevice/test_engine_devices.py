"""What is generated does not depend on the mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from odd_config import ODD_CONFIG

from postrain.config import MeshConfig
from postrain.models.params import axes_of, init_params, param_specs
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams
from postrain.sharding import make_mesh, named_shardings
from postrain.training.step import count_compilations

CONFIG = dataclasses.replace(ODD_CONFIG, init_std=0.2)


MESHES = [{"data": 8, "fsdp": 1}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_generation_does_not_depend_on_the_mesh(mesh):
    mesh = make_mesh(MeshConfig(**mesh))
    params = init_params(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 301, length).tolist() for length in (3, 20, 11)]
    banned = tuple(range(0, 301, 3))
    for sampling in (
        SamplingParams(max_new_tokens=20),
        SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=20, banned_ids=banned),
    ):
        expected = Engine(params, CONFIG).generate(prompts, sampling)
        sharded = jax.device_put(params, named_shardings(axes_of(param_specs(CONFIG)), mesh, params))
        out = Engine(sharded, CONFIG).generate(prompts, sampling)
        assert [c.tokens for c in out] == [c.tokens for c in expected]
        for completion, reference in zip(out, expected, strict=True):
            np.testing.assert_allclose(completion.model_logprobs, reference.model_logprobs, atol=1e-5)
        with count_compilations() as compiled:
            Engine(sharded, CONFIG).generate(prompts[::-1], sampling)
        assert not compiled
    engine = Engine(sharded, CONFIG)
    handle = engine.submit(prompts[0], sampling)
    waiting = engine.submit(prompts[1], sampling, sample_id=1)
    while not engine.num_running:
        engine.step()
    assert engine.cancel(handle).finish == "abort"  # before its first token: its row is emptied
    found = {}
    while not engine.is_idle:
        found |= {event.handle: event.completion for event in engine.step() if event.completion}
    assert found[waiting].tokens == expected[1].tokens


@pytest.mark.parametrize("mesh", MESHES[1:3], ids=str)
def test_weights_of_a_mesh_change_in_mid_answer(mesh):
    """Groups and a common beginning too; the update is checked against the forward that trains, on the same mesh."""
    mesh = make_mesh(MeshConfig(**mesh))
    axes = axes_of(param_specs(CONFIG))
    old, new = (init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1))
    beginning = np.random.default_rng(0).integers(0, 301, 40).tolist()
    prompts = [beginning + end for end in ([1], [2, 3], [4])] * 2
    sampling = SamplingParams(temperature=1.0, max_new_tokens=12)

    def run(params, other):
        engine = Engine(params, CONFIG, steps=5)
        handles = [engine.submit(prompt, sampling, sample_id=i) for i, prompt in enumerate(prompts)]
        events = []
        while not events:
            events = engine.step()
        assert engine.update_weights(other, version=1) < 1e-5
        found = {}
        while not engine.is_idle:
            found |= {event.handle: event.completion for event in engine.step() if event.completion}
        return [found[handle] for handle in handles]

    expected = run(old, new)
    out = run(*(jax.device_put(params, named_shardings(axes, mesh, params)) for params in (old, new)))
    for one, reference in zip(out, expected, strict=True):
        assert one.tokens == reference.tokens
        assert set(one.versions) == {0, 1}
        np.testing.assert_allclose(one.logprobs, reference.logprobs, atol=1e-5)
