"""Post-training of language models in JAX: from a Hugging Face folder and your data to a better folder.

    model_config, params = postrain.load_pretrained("MODEL_DIR")
    logits = postrain.logits(params, model_config, tokens)
    metrics = postrain.train(config, "runs/mine")
    answers = postrain.generate("MODEL_DIR", ["Why is the sky blue?"])

Each name is loaded when it is first used, so that ``import postrain`` costs nothing.
"""

import importlib

from postrain.environment import set_up

_HOMES = {
    "Config": "postrain.config",
    "UserError": "postrain.errors",
    "generate": "postrain.rollout.chat",
    "load_config": "postrain.config.load",
    "load_pretrained": "postrain.hf.load",
    "load_tokenizer": "postrain.data.rendering.tokenizer",
    "logits": "postrain.models.transformer",
    "train": "postrain.recipes",
}
__all__ = list(_HOMES)
set_up()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'postrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
