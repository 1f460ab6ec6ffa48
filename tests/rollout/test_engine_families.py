"""Every family that trains also samples: transformers' greedy ids, the trainer's log-probabilities."""

import numpy as np
import pytest
import torch
import transformers
from engine_checks import check_model_logprobs, generate_in_torch, make_prompts, score
from tiny_models import FAMILIES, make_tiny_model

from postrain.hf.load import load_pretrained
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams

NEW = 16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_samples_as_it_trains(family, tmp_path):
    make_tiny_model(tmp_path / "model", family)
    config, params = load_pretrained(tmp_path / "model")
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    prompts = [prompt for seed in range(3) for prompt in make_prompts((1, 20, 7), seed=seed)]
    settings = SamplingParams(max_new_tokens=NEW), SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=NEW)
    both = Engine(params, config).generate(prompts * 2, [one for one in settings for _ in prompts])
    greedy, sampled = both[: len(prompts)], both[len(prompts) :]
    assert [one.tokens for one in greedy] == [generate_in_torch(torch_model, prompt, NEW) for prompt in prompts]
    check_model_logprobs(params, config, prompts, greedy, 1.0)
    check_model_logprobs(params, config, prompts, sampled, 0.8)
    for one, logprobs in zip(sampled, score(params, config, prompts, sampled, 0.8), strict=True):
        for step, row in enumerate(logprobs):  # of what was sampled from: the fewest ids that reach 0.9
            kept = np.sort(np.exp(row.astype(np.float64)))[::-1]
            mass = kept[: np.searchsorted(np.cumsum(kept), 0.9) + 1].sum()
            np.testing.assert_allclose(one.kept_mass[step], mass, atol=1e-5)
            np.testing.assert_allclose(one.logprobs[step], row[one.tokens[step]] - np.log(mass), atol=1e-5)
