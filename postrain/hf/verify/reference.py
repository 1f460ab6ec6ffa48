"""The reference that `postrain verify` compares with: `transformers` in torch, plain attention and plain experts.

In float32 as it is, and in float64 throughout: `transformers` casts to float32 here and there (norms, rotations,
softmaxes, routers), whatever the dtype of the weights. ``_Mode`` makes float32 mean float64 in those places, for any
model, so that what differs from this stack is a difference of the mathematics, not of rounding.

This module alone imports torch, when one of its functions is called.
"""

import contextlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from postrain.errors import UserError
from postrain.hf.find_model import ModelFolder
from postrain.hf.folders import copy_side_files
from postrain.hf.peft.rows import needed_vocabulary


def require_torch() -> None:
    """Raises UserError, saying what to install, where there is no torch."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        advice = "pip install torch (for CPU is enough)"
        raise UserError(f"verify compares with the reference in torch, which is not installed: {advice}") from error


class Reference:
    """A model in torch. Raises UserError where ``found`` is an adapter and peft is not installed.

    ``dtype``: "float32" or "float64", of its weights and of all that it computes.
    """

    def __init__(self, found: ModelFolder, dtype: str):
        import torch

        self.dtype = dtype
        plain = {"attn_implementation": "eager", "experts_implementation": "eager", "local_files_only": True}
        with self._mode():  # which fills tables of its own as it is made: frequencies, multipliers
            model = _transformers().AutoModelForCausalLM.from_pretrained(
                found.base, dtype=getattr(torch, dtype), **plain
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
            model = model.to(getattr(torch, dtype))
        self.model = model.eval()

    def _mode(self, experts: Sequence | None = None):
        return _make_mode(self.dtype == "float64", experts)

    def logits(
        self, doc: np.ndarray, start: int = 0, last: int = 0, experts: Sequence | None = None
    ) -> tuple[np.ndarray, list]:
        """Logits [T, V] of a document, and its tokens' experts, one entry for each router.

        ``start``: position of the first token. ``last``: logits of so many tokens alone, the last ones; 0: of all.
        ``experts``: those of an earlier call, to send every token to the same ones again.
        """
        import torch

        with torch.no_grad(), self._mode(experts) as mode:
            logits = self.model(**_inputs(doc, start), logits_to_keep=last).logits[0].numpy()
        return logits, mode.experts

    def states(self, doc: np.ndarray, start: int, silenced: int | None = None) -> list[np.ndarray]:
        """Hidden states [T, D] as they enter the first layer and leave each layer, before the final norm.

        ``silenced``: a layer whose feed-forward gives nothing.
        """
        import torch

        layers, states = getattr(self.model.model, "language_model", self.model.model).layers, []
        first = lambda out: out[0] if isinstance(out, tuple) else out
        silence = lambda module, args, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0
        with contextlib.ExitStack() as stack, torch.no_grad(), self._mode():
            keep = lambda x: states.append(x[0].numpy().copy())
            entered = lambda module, args, kwargs: keep(args[0] if args else kwargs["hidden_states"])
            hooks = [layers[0].register_forward_pre_hook(entered, with_kwargs=True)]
            hooks += [layer.register_forward_hook(lambda module, args, out: keep(first(out))) for layer in layers]
            if silenced is not None:
                hooks.append(layers[silenced].mlp.register_forward_hook(silence))
            for hook in hooks:
                stack.callback(hook.remove)
            self.model(**_inputs(doc, start))
        return states


def _make_mode(double: bool, experts: Sequence | None):
    """A context for torch: with ``double`` float32 means float64; ``experts`` are what its routers choose.

    Its ``experts`` are those chosen within it, where none are given.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.experts, self._replayed = [], iter(experts or ())

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if double:
                wide = lambda x: torch.float64 if x is torch.float32 else x
                args, kwargs = tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}
                func = torch.Tensor.double if func is torch.Tensor.float else func
            if func not in (torch.topk, torch.Tensor.topk):
                return func(*args, **kwargs)
            if experts is not None:
                chosen = next(self._replayed)
                return torch.return_types.topk((args[0].gather(-1, chosen), chosen))
            found = func(*args, **kwargs)
            self.experts.append(found.indices)
            return found

    return Mode()


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


def _inputs(doc: np.ndarray, start: int) -> dict:
    import torch

    positions = torch.arange(start, start + len(doc))[None]
    return {"input_ids": torch.from_numpy(doc.astype(np.int64))[None], "position_ids": positions, "use_cache": False}
