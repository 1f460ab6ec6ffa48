"""Are the logits of this stack those of the reference implementation? Compared in float32, number by number.

The reference is `transformers` in torch with plain attention. Inputs: random token ids (every row of the embedding
can occur) at the first positions, at the last ones that the model was made for, and in a row longer than its window;
real text; the same text packed into one row, where the reference sees each document by itself. When they differ, the
hidden states after every layer are compared, and the first layer that departs and its sublayer are named.
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from postrain.errors import UserError
from postrain.hf.hub import find_model
from postrain.hf.peft.adapter import load_model
from postrain.hf.verify.reference import (
    compute_reference_logits,
    compute_reference_states,
    load_reference,
    require_torch,
    write_random_model,
)
from postrain.models.config import ModelConfig
from postrain.models.params import name_broken
from postrain.models.transformer import compute_hidden_and_routing, compute_logits, rms_norm

TOLERANCE = 1e-4  # of the standard deviation of the reference's logits
TIE = 1e-5  # router logits that are closer leave it to rounding who is chosen
LONGEST_WINDOW = 4096  # whose row is compared: the reference makes [heads, T, T] of it
TEXTS = (
    'The harbour was quiet at six; only the ferry\'s lights moved. "Two tickets," she said, "one way."',
    "Zażółć gęślą jaźń, 東京の天気は晴れ、Привет! 1,234.5 km² costs €99 — isn't it? 🚲",
    "def area(r):\n    return 3.14159 * r**2  # square metres\n\nprint(area(2.0))\n",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of one input, over all of its tokens and the whole vocabulary.

    ``max_abs_diff`` in logits; ``relative`` to ``scale``, the standard deviation of the reference's logits;
    ``kl_mean`` and ``kl_max`` of KL(reference || ours) per token, nats; ``top1_agreement`` in [0, 1]. ``num_undecided``
    tokens are left out: those of a document from its first wrong one on, where a router scored two experts as good as
    equal at that very token, so that either is right.
    """

    name: str
    num_tokens: int
    max_abs_diff: float
    scale: float
    relative: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    num_undecided: int = 0


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
            if c.num_undecided:
                lines.append(f"  {'':<22}{c.num_undecided:>7} more left out, after a router's tie")
        verdict = f"PASS: all within {self.tolerance:g} of the logits' scale"
        if not self.passed:
            verdict = f"FAIL: tolerance {self.tolerance:g} of the logits' scale; first departs {self.first_departure}"
        return "\n".join([*lines, verdict])


class Input(NamedTuple):
    """Documents to compare logits of: each in a row of its own or all packed into one, from position ``start`` on."""

    name: str
    docs: list[np.ndarray]
    packed: bool = False
    start: int = 0


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
    require_torch()
    found = find_model(folder)
    config, params = load_model(found)
    reference = load_reference(found)
    inputs = list(_random_inputs(config, seed, min(64, max_length))) if random_tokens else []
    texts = _tokenize(found.tokenizer, TEXTS if prompt_texts is None else prompt_texts, config, max_length)
    if texts:
        inputs += [Input("text, a row each", texts), Input("text, packed", texts, packed=True)]
    if not inputs:
        raise UserError(f"{folder}: nothing to verify: no tokenizer.json or no text, and random_tokens is off")
    comparisons, departure = [], ""
    for one in inputs:
        ours, margins = _our_logits(params, config, one)
        theirs = [compute_reference_logits(reference, doc, one.start) for doc in one.docs]
        comparisons.append(compare(one.name, ours, theirs, margins, tolerance))
        if not departure and not comparisons[-1].relative <= tolerance:
            departure = _find_departure(params, config, reference, one, tolerance)
    return VerifyReport(str(folder), tolerance, tuple(comparisons), departure)


def verify_random(folder: str | os.PathLike, *, num_layers: int = 0, seed: int = 0, **options) -> VerifyReport:
    """``verify`` of random weights for the folder's own config.json: no weights need to be there.

    ``num_layers``: that many of the layers, 0 for all.
    """
    require_torch()
    found = find_model(folder, weights=False)
    if found.adapter is not None:
        raise UserError(f"{folder}: --random makes the weights of a whole model, this is an adapter: give its base")
    with tempfile.TemporaryDirectory() as made:
        write_random_model(found.base, made, num_layers=num_layers, seed=seed)
        report = verify(made, seed=seed, **options)
    return dataclasses.replace(report, folder=f"{folder} (random weights)")


def _random_inputs(config: ModelConfig, seed: int, length: int) -> Iterator[Input]:
    """Any token of the vocabulary, where a document starts, where positions end, and past the window."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: list(rng.integers(0, config.vocab_size, shape))
    yield Input("random ids", draw(2, length))
    if config.max_positions > length:
        yield Input("at the last positions", draw(2, length), start=config.max_positions - length)
    window = min((window for window in config.layer_windows if window), default=0)
    if 0 < window <= LONGEST_WINDOW:
        yield Input("longer than the window", draw(1, window + length))


def compare(
    name: str,
    ours: list[np.ndarray],
    theirs: list[np.ndarray],
    margins: list[np.ndarray] | None = None,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """``ours`` and ``theirs``: logits [T, V] of each document; ``margins``: [T], the least of any router's there.

    Raises UserError when theirs are all equal, or ties leave less than half of the tokens to compare.
    """
    b = np.concatenate(theirs).astype(np.float64)
    scale = float(b.std())
    if scale == 0:
        raise UserError(f"verify: {name}: the reference's logits are all equal: the weights are no model's")
    keep = np.concatenate([np.ones(len(rows), bool) for rows in ours])
    if margins is not None:
        keep = np.concatenate([_decided(*doc, tolerance * scale) for doc in zip(ours, theirs, margins, strict=True)])
    if keep.mean() < 0.5:
        raise UserError(f"verify: {name}: routers are undecided before most tokens: try another seed, or fewer layers")
    a, b = np.concatenate(ours).astype(np.float64)[keep], b[keep]
    diff = float(np.abs(a - b).max())
    log_p, log_q = _log_softmax(b), _log_softmax(a)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    agreement = float((a.argmax(-1) == b.argmax(-1)).mean())
    kl_mean, kl_max = float(max(kl.mean(), 0)), float(max(kl.max(), 0))
    return Comparison(name, len(a), diff, scale, diff / scale, kl_mean, kl_max, agreement, int((~keep).sum()))


def _decided(ours: np.ndarray, theirs: np.ndarray, margins: np.ndarray, limit: float) -> np.ndarray:
    """Bool [T]: all, or those before the first token that differs, if rounding may have chosen an expert there."""
    wrong = ~(np.abs(ours.astype(np.float64) - theirs).max(-1) <= limit)  # NaN is wrong, and no tie
    first = int(wrong.argmax())
    excused = wrong.any() and margins[first] <= TIE and np.isfinite(ours).all()
    return np.arange(len(ours)) < first if excused else np.ones(len(ours), bool)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


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


def _run(params: dict, config: ModelConfig, one: Input) -> tuple[list[jax.Array], list[jax.Array] | None]:
    """Hidden states after the final norm, [T, D] of each document, and the routers' margins, [L, T] of each."""
    rows = [np.concatenate(one.docs)] if one.packed else one.docs
    length = max(len(row) for row in rows)
    tokens, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    spans, start = [], 0
    for i, doc in enumerate(one.docs):
        row, start = (0, start) if one.packed else (i, 0)
        span = slice(start, start + len(doc))
        tokens[row, span], segments[row, span], positions[row, span] = doc, i + 1, one.start + np.arange(len(doc))
        spans.append((row, span))
        start += len(doc)
    with jax.default_matmul_precision("highest"):  # float32 products on accelerators too
        hidden, routed = _compute(params, config, tokens, segments, positions)
    margins = None if routed is None else [routed.margins[:, row, span] for row, span in spans]
    return [hidden[row, span] for row, span in spans], margins


_compute = jax.jit(compute_hidden_and_routing, static_argnums=1)


def _our_logits(params, config: ModelConfig, one: Input) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Logits [T, V] of each document, and the least margin of any layer's router at each token, None without."""
    hidden, margins = _run(params, config, one)
    with jax.default_matmul_precision("highest"):
        logits = [np.asarray(compute_logits(params, config, rows))[:, : config.vocab_size] for rows in hidden]
    return logits, margins and [np.asarray(of_doc).min(0) for of_doc in margins]


def _find_departure(params: dict, config: ModelConfig, reference, one: Input, tolerance: float) -> str:
    """The first place where the hidden states differ.

    Both sides' states go through this side's final norm: compared on one scale, whatever a layer adds up to. Within
    the layer that departs, the reference's feed-forward is silenced on both sides: what still differs is attention.
    """
    normed = lambda states: np.asarray(rms_norm(jnp.asarray(states), params["final_norm"], config))

    if broken := name_broken(params):
        return f"in {broken}, which holds numbers that are not finite"
    run_reference = lambda silenced: [compute_reference_states(reference, doc, one.start, silenced) for doc in one.docs]

    def differ(depth: int, layers: dict, theirs: list[list[np.ndarray]]) -> float:
        """Largest difference after ``depth`` layers, of the states' spread."""
        cut = dataclasses.replace(config, num_layers=depth, layer_windows=config.layer_windows[:depth])
        ours = np.concatenate(_run(params | {"layers": layers}, cut, one)[0])
        other = normed(np.concatenate([states[depth] for states in theirs]))
        return float(np.abs(ours - other).max() / other.std())

    whole = run_reference(None)
    for depth in range(config.num_layers + 1):
        layers = jax.tree.map(lambda x, depth=depth: jnp.asarray(x)[:depth], params["layers"])
        relative = differ(depth, layers, whole)
        if relative <= tolerance:
            continue
        found = f"(hidden states {relative:.2e} of their scale)"
        if depth == 0:
            return f"in the embedding {found}"
        still = differ(depth, _silence(layers, depth - 1), run_reference(depth - 1))
        part = "attention" if not still <= tolerance else "feed-forward" if config.moe is None else "experts"
        return f"in layer {depth - 1}, in its {part} {found}"
    return "in the final norm or the projection onto the vocabulary"


def _silence(layers: dict, index: int) -> dict:
    """Layer ``index`` without what its feed-forward gives."""
    name = "moe" if "moe" in layers else "mlp"
    down = jax.tree.map(lambda x: x.at[index].set(0), layers[name]["down"])
    return layers | {name: layers[name] | {"down": down}}
