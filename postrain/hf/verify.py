"""Are the logits of this stack those of the reference implementation? Compared in float32, number by number.

The reference is `transformers` in torch with plain attention, which this module alone imports, when it is
called. Three inputs: random token ids (every row of the embedding can occur), real text, and the same text
packed into one row, where the reference sees each document by itself. When they differ, the hidden states
after every layer are compared and the first layer that departs is named.
"""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from postrain.errors import UserError
from postrain.hf.model_folder import ModelFolder, find_model, load_model
from postrain.hf.peft_rows import needed_vocabulary
from postrain.models.config import ModelConfig
from postrain.models.transformer import compute_hidden, compute_logits

TOLERANCE = 1e-4  # of the standard deviation of the reference's logits
TEXTS = (
    'The harbour was quiet at six; only the ferry\'s lights moved. "Two tickets," she said, "one way."',
    "Zażółć gęślą jaźń, 東京の天気は晴れ、Привет! 1,234.5 km² costs €99 — isn't it? 🚲",
    "def area(r):\n    return 3.14159 * r**2  # square metres\n\nprint(area(2.0))\n",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of one input, over all of its tokens and the whole vocabulary.

    ``max_abs_diff`` in logits; ``relative`` to ``scale``, the standard deviation of the reference's logits;
    ``kl_mean`` and ``kl_max`` of KL(reference || ours) per token, nats; ``top1_agreement`` in [0, 1].
    """

    name: str
    num_tokens: int
    max_abs_diff: float
    scale: float
    relative: float
    kl_mean: float
    kl_max: float
    top1_agreement: float


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `postrain verify` prints. ``first_departure`` is empty when the logits agree."""

    folder: str
    tolerance: float
    comparisons: tuple[Comparison, ...]
    first_departure: str = ""

    @property
    def passed(self) -> bool:
        return all(comparison.relative <= self.tolerance for comparison in self.comparisons)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        lines = [f"{self.folder}: logits against transformers (torch), float32"]
        heads = ("input", "tokens", "max |diff|", "of scale", "KL mean", "KL max", "top-1 equal")
        lines.append("  {:<22}{:>7}{:>12}{:>11}{:>11}{:>11}{:>13}".format(*heads))
        for c in self.comparisons:
            lines.append(
                f"  {c.name:<22}{c.num_tokens:>7}{c.max_abs_diff:>12.2e}{c.relative:>11.2e}{c.kl_mean:>11.2e}"
                f"{c.kl_max:>11.2e}{c.top1_agreement:>13.2%}"
            )
        verdict = f"PASS: all within {self.tolerance:g} of the logits' scale"
        if not self.passed:
            verdict = f"FAIL: tolerance {self.tolerance:g} of the logits' scale; first departs {self.first_departure}"
        return "\n".join([*lines, verdict])


def verify(
    folder: str | os.PathLike,
    *,
    prompt_texts: list[str] | None = None,
    random_tokens: bool = True,
    seed: int = 0,
    max_length: int = 96,
    tolerance: float = TOLERANCE,
) -> VerifyReport:
    """Compares the folder's logits here with the reference's; texts are cut to ``max_length`` tokens.

    Text is compared when the folder has a tokenizer.json; ``prompt_texts`` replaces the built-in texts,
    and with neither text nor ``random_tokens`` there is nothing to compare (UserError). Raises UserError
    also when torch is not installed (or peft, where ``folder`` is an adapter's) and for everything that load_model
    refuses.
    """
    _require_torch()
    found = find_model(folder)
    config, params = load_model(found)
    reference = _load_reference(found)
    documents = _tokenize(found.tokenizer, TEXTS if prompt_texts is None else prompt_texts, config, max_length)
    inputs = []  # (documents, layouts: name -> packed into one row)
    if random_tokens:
        rows = np.random.default_rng(seed).integers(0, config.vocab_size, (2, min(64, max_length)))
        inputs.append((list(rows), {"random ids": False}))
    if documents:
        inputs.append((documents, {"text, a row each": False, "text, packed": True}))
    if not inputs:
        raise UserError(f"{folder}: nothing to verify: no tokenizer.json or no text, and random_tokens is off")
    comparisons, wrong = [], None
    for docs, layouts in inputs:
        theirs = [_reference_logits(reference, doc) for doc in docs]
        for name, packed in layouts.items():
            comparisons.append(compare(name, _our_logits(params, config, docs, packed), theirs))
            if not comparisons[-1].relative <= tolerance and wrong is None:
                wrong = docs, packed
    departure = "" if wrong is None else _find_departure(params, config, reference, *wrong, tolerance)
    return VerifyReport(str(folder), tolerance, tuple(comparisons), departure)


def compare(name: str, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Comparison:
    """``ours`` and ``theirs``: logits [T, V] of each document. Raises UserError when theirs are all equal."""
    a, b = (np.concatenate(rows).astype(np.float64) for rows in (ours, theirs))
    diff, scale = float(np.abs(a - b).max()), float(b.std())
    if scale == 0:
        raise UserError(f"verify: {name}: the reference's logits are all equal: the weights are no model's")
    log_p, log_q = _log_softmax(b), _log_softmax(a)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    agreement = float((a.argmax(-1) == b.argmax(-1)).mean())
    return Comparison(
        name, len(a), diff, scale, diff / scale, float(max(kl.mean(), 0)), float(max(kl.max(), 0)), agreement
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        advice = "pip install torch (for CPU is enough)"
        raise UserError(f"verify compares with the reference in torch, which is not installed: {advice}") from error


def _load_reference(found: ModelFolder):
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        found.base, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if found.adapter is not None:
        if (vocab_size := needed_vocabulary(found.adapter)) > model.config.vocab_size:
            model.resize_token_embeddings(vocab_size)
        try:
            model.load_adapter(str(found.adapter))
        except ImportError as error:
            raise UserError("verify of an adapter needs peft, which is not installed: pip install peft") from error
    return model.eval()


def _tokenize(folder, texts, config: ModelConfig, max_length: int) -> list[np.ndarray]:
    import tokenizers

    file = pathlib.Path(folder) / "tokenizer.json"
    if not file.is_file():
        return []
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    rows = [np.asarray(tokenizer.encode(text).ids[:max_length], np.int64) for text in texts]
    if too_big := [int(row.max()) for row in rows if row.size and row.max() >= config.vocab_size]:
        raise UserError(f"{file}: gives token {max(too_big)}, but config.json has vocab_size {config.vocab_size}")
    return [row for row in rows if row.size]


def _our_hidden(params: dict, config: ModelConfig, docs: list[np.ndarray], packed: bool) -> list[jax.Array]:
    """Hidden states after the final norm, [T, D] for each document, from one row each or one row of all."""
    rows = [np.concatenate(docs)] if packed else docs
    length = max(len(row) for row in rows)
    tokens, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    spans, start = [], 0
    for i, doc in enumerate(docs):
        row, start = (0, start) if packed else (i, 0)
        span = slice(start, start + len(doc))
        tokens[row, span], segments[row, span], positions[row, span] = doc, i + 1, np.arange(len(doc))
        spans.append((row, span))
        start += len(doc)
    with jax.default_matmul_precision("highest"):  # float32 products on accelerators too
        hidden = jax.jit(compute_hidden, static_argnums=1)(params, config, tokens, segments, positions)
    return [hidden[row, span] for row, span in spans]


def _our_logits(params: dict, config: ModelConfig, docs: list[np.ndarray], packed: bool) -> list[np.ndarray]:
    with jax.default_matmul_precision("highest"):
        logits = [compute_logits(params, config, hidden) for hidden in _our_hidden(params, config, docs, packed)]
    return [np.asarray(rows)[:, : config.vocab_size] for rows in logits]


def _reference_logits(reference, doc: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return reference(torch.from_numpy(doc)[None], use_cache=False).logits[0].numpy()


def _find_departure(
    params: dict, config: ModelConfig, reference, docs: list[np.ndarray], packed: bool, tolerance: float
) -> str:
    """The first place where the hidden states differ, each taken through the final norm for one scale."""
    import torch

    with torch.no_grad():
        theirs = [reference.model(torch.from_numpy(doc)[None], output_hidden_states=True) for doc in docs]
        # The reference's last state has been through the norm already.
        normed = [
            [reference.model.norm(state)[0].numpy() for state in out.hidden_states[:-1]]
            + [out.hidden_states[-1][0].numpy()]
            for out in theirs
        ]
    for depth in range(config.num_layers + 1):
        cut = dataclasses.replace(config, num_layers=depth)
        layers = jax.tree.map(lambda x, depth=depth: jnp.asarray(x)[:depth], params["layers"])
        ours = np.concatenate([np.asarray(h) for h in _our_hidden(params | {"layers": layers}, cut, docs, packed)])
        other = np.concatenate([states[depth] for states in normed])
        relative = float(np.abs(ours - other).max() / other.std())
        if not relative <= tolerance:
            place = "in the embedding" if depth == 0 else f"in layer {depth - 1}"
            return f"{place} (hidden states {relative:.2e} of their scale)"
    return "in the projection onto the vocabulary"
