"""The reference that `postrain verify` compares with: `transformers` in torch, float32, plain attention.

This module alone imports torch, when one of its functions is called.
"""

import contextlib
import os
import pathlib

import numpy as np

from postrain.errors import UserError
from postrain.hf.hub import ModelFolder
from postrain.hf.peft.rows import needed_vocabulary
from postrain.hf.side_files import copy_side_files


def require_torch() -> None:
    """Raises UserError, saying what to install, where there is no torch."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        advice = "pip install torch (for CPU is enough)"
        raise UserError(f"verify compares with the reference in torch, which is not installed: {advice}") from error


def load_reference(found: ModelFolder):
    """The torch model. Raises UserError where ``found`` is an adapter and peft is not installed."""
    import torch

    model = _transformers().AutoModelForCausalLM.from_pretrained(
        found.base, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if found.adapter is not None:
        if (vocab_size := needed_vocabulary(found.adapter)) > model.config.vocab_size:
            model.resize_token_embeddings(vocab_size)
        try:
            import peft
        except ImportError as error:
            raise UserError("verify of an adapter needs peft, which is not installed: pip install peft") from error
        # Not the model's own `load_adapter`, which leaves DoRA's magnitudes out.
        model = peft.PeftModel.from_pretrained(model, str(found.adapter)).get_base_model()
    return model.eval()


def write_random_model(source: str | os.PathLike, folder: str | os.PathLike, *, num_layers: int = 0, seed: int = 0):
    """Writes a model of ``source``'s config.json with random weights, and its tokenizer, to ``folder``.

    Norms, biases and sinks are random too, so that a mechanism that is left out shows. ``num_layers``: the first so
    many layers alone, 0 for all; a large model is as well tested by some periods of its pattern.
    """
    import torch

    config = _transformers().AutoConfig.from_pretrained(source, local_files_only=True).get_text_config()
    if num_layers > config.num_hidden_layers:
        raise UserError(f"--layers {num_layers}: {source} has {config.num_hidden_layers}")
    if num_layers:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    torch.manual_seed(seed)
    model = _transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if "norm" in name and float(parameter.mean()) else 0.0  # as it starts: 1, or 0 of 1 + w
                parameter.copy_(center + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.tie_weights()
    model.save_pretrained(folder)
    copy_side_files(pathlib.Path(source), pathlib.Path(folder))


def _transformers():
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def compute_reference_logits(model, doc: np.ndarray, start: int) -> np.ndarray:
    """Logits [T, V] of a document whose first token is at position ``start``."""
    import torch

    with torch.no_grad():
        return model(**_inputs(doc, start)).logits[0].numpy()


def compute_reference_states(model, doc: np.ndarray, start: int, silenced: int | None = None) -> list[np.ndarray]:
    """Hidden states [T, D] as they enter the first layer and leave each layer, before the final norm.

    ``silenced``: a layer whose feed-forward gives nothing.
    """
    import torch

    layers, states = getattr(model.model, "language_model", model.model).layers, []
    first = lambda out: out[0] if isinstance(out, tuple) else out
    silence = lambda module, args, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0
    with contextlib.ExitStack() as stack, torch.no_grad():
        keep = lambda x: states.append(x[0].numpy().copy())
        entered = lambda module, args, kwargs: keep(args[0] if args else kwargs["hidden_states"])
        hooks = [layers[0].register_forward_pre_hook(entered, with_kwargs=True)]
        hooks += [layer.register_forward_hook(lambda module, args, out: keep(first(out))) for layer in layers]
        if silenced is not None:
            hooks.append(layers[silenced].mlp.register_forward_hook(silence))
        for hook in hooks:
            stack.callback(hook.remove)
        model(**_inputs(doc, start))
    return states


def _inputs(doc: np.ndarray, start: int) -> dict:
    import torch

    positions = torch.arange(start, start + len(doc))[None]
    return {"input_ids": torch.from_numpy(doc.astype(np.int64))[None], "position_ids": positions, "use_cache": False}
