"""Beams do not depend on the mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from odd_config import ODD_CONFIG

from postrain.config import MeshConfig
from postrain.models.params import axes_of, init_params, param_specs
from postrain.rollout.beams import search_beams
from postrain.rollout.constraints.trie import build_trie
from postrain.sharding import make_mesh, named_shardings

CONFIG = dataclasses.replace(ODD_CONFIG, init_std=0.2)


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_beams_do_not_depend_on_the_mesh(mesh):
    params = init_params(CONFIG, jax.random.key(0))
    sharded = jax.device_put(
        params, named_shardings(axes_of(param_specs(CONFIG)), make_mesh(MeshConfig(**mesh)), params)
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 301, length).tolist() for length in (3, 20, 11)]
    items = np.unique(rng.integers(100, 120, (30, 3)), axis=0)
    for options in (
        {"num_beams": 3, "max_new_tokens": 6, "stop_ids": tuple(range(0, 301, 5))},
        {"num_beams": 5, "max_new_tokens": 3, "trie": build_trie(items, vocab_size=301)},
    ):
        expected = search_beams(params, CONFIG, prompts, **options)
        found = search_beams(sharded, CONFIG, prompts, **options)
        for ours, reference in zip(found, expected, strict=True):
            assert [beam.tokens for beam in ours] == [beam.tokens for beam in reference]
            np.testing.assert_allclose([beam.score for beam in ours], [beam.score for beam in reference], atol=1e-5)
