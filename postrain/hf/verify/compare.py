"""Are the logits of this stack those of the reference implementation? Compared number by number, in two steps.

In float64 on both sides, on the CPU: rounding is then some 1e-14 of the logits' spread, and whatever is larger than
1e-9 is a difference of the mathematics. In float32, on the default device: each side is compared with the reference's
float64 logits, and this stack's error may be at most ten times the reference's own. Sums in another order are as
right, and how much they differ depends on the processor and on the model's weights; no fixed tolerance would do.

The reference is `transformers` in torch with plain attention. Inputs: random token ids (every row of the embedding
can occur) at the first positions, at the last ones that the model was made for, and in a row longer than its window;
real text; the same text packed into one row, where the reference sees each document by itself. When they differ in
float64, the hidden states after every layer are compared, and the first layer that departs and its sublayer are named.

Memory: this side holds the weights in float32, the reference in float64 and then in float32: 12 bytes a parameter.
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from postrain.errors import UserError
from postrain.hf.config import read_config
from postrain.hf.find_model import ModelFolder, find_model
from postrain.hf.peft.adapter import load_model
from postrain.hf.verify.reference import Reference, require_torch, write_random_model
from postrain.models.config import ModelConfig
from postrain.models.params import abstract_params, name_broken, num_params
from postrain.models.transformer import compute_hidden_and_routing, compute_logits, rms_norm

TOLERANCE = 1e-9  # in float64, of the standard deviation of the reference's logits
MOST_TIMES = 10  # the reference's own float32 error
TIE = 1e-9  # router logits that are closer in float64 leave it to rounding who is chosen
LONGEST_WINDOW = 4096  # whose row is compared: the reference makes [heads, T, T] of it
BYTES_A_PARAMETER = 12  # float32 here, float64 in the reference
TEXTS = (
    'The harbour was quiet at six; only the ferry\'s lights moved. "Two tickets," she said, "one way."',
    "Zażółć gęślą jaźń, 東京の天気は晴れ、Привет! 1,234.5 km² costs €99 — isn't it? 🚲",
    "def area(r):\n    return 3.14159 * r**2  # square metres\n\nprint(area(2.0))\n",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of one input, over its compared tokens and the whole vocabulary.

    In float64: ``max_abs_diff`` in logits; ``relative`` to ``scale``, the standard deviation of the reference's
    logits; ``kl_mean`` and ``kl_max`` of KL(reference || ours) per token, nats; ``top1_agreement`` in [0, 1].
    ``num_undecided`` tokens are left out: those of a document from its first wrong one on, where a router scored two
    experts as good as equal at that very token, so that either is right.

    ``float32_error`` and ``reference_float32_error``: largest difference of float32 logits from the reference's
    float64 ones, relative to ``scale``; with the experts that each side chose in float64.
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
    float32_error: float = 0.0
    reference_float32_error: float = 0.0

    @property
    def rounds_as_well(self) -> bool:
        return self.float32_error <= MOST_TIMES * self.reference_float32_error


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `postrain verify` prints. ``first_departure`` is empty when the float64 logits agree."""

    folder: str
    tolerance: float
    comparisons: tuple[Comparison, ...]
    first_departure: str = ""

    @property
    def agrees(self) -> bool:
        """In float64: the mathematics are the reference's."""
        return all(comparison.relative <= self.tolerance for comparison in self.comparisons)

    @property
    def passed(self) -> bool:
        return self.agrees and all(comparison.rounds_as_well for comparison in self.comparisons)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        device = jax.default_backend()
        lines = [f"{self.folder}: logits against transformers (torch) in float64, and float32 errors on {device}"]
        layout = "  {:<22}{:>7}{:>12}{:>11}{:>11}{:>11}{:>13}{:>15}{:>9}"
        heads = (
            "input",
            "tokens",
            "max |diff|",
            "of scale",
            "KL mean",
            "KL max",
            "top-1 equal",
            "float32: ours",
            "torch's",
        )
        lines.append(layout.format(*heads))
        exact = lambda x: f"{x:.2e}"
        for c in self.comparisons:
            numbers = map(exact, (c.max_abs_diff, c.relative, c.kl_mean, c.kl_max))
            errors = map(exact, (c.float32_error, c.reference_float32_error))
            lines.append(layout.format(c.name, c.num_tokens, *numbers, f"{c.top1_agreement:.2%}", *errors))
            if c.num_undecided:
                lines.append(f"  {'':<22}{c.num_undecided:>7} more left out, after a router's tie")
        within, times = f"{self.tolerance:g} of the logits' scale in float64", f"at most {MOST_TIMES} times torch's"
        names = ", ".join(c.name for c in self.comparisons if not c.rounds_as_well)
        if not self.agrees:
            verdict = f"FAIL: tolerance {within}; first departs {self.first_departure}"
        elif names:
            verdict = f"FAIL: within {within}, but float32 errors of {names}: expected {times}"
        else:
            verdict = f"PASS: all within {within}; float32 errors {times}"
        return "\n".join([*lines, verdict])


class Input(NamedTuple):
    """Documents to compare logits of: each in a row of its own or all packed into one, from position ``start`` on.

    ``last``: tokens of each document that are compared, the last ones; 0: all.
    """

    name: str
    docs: list[np.ndarray]
    packed: bool = False
    start: int = 0
    last: int = 0


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
    also when torch is not installed (or peft, where ``folder`` is an adapter's), memory does not suffice, and for
    everything that load_model refuses.
    """
    require_torch()
    found = find_model(folder)
    _check_memory(found)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            f"verify computes in float64 on the CPU, which JAX_PLATFORMS={jax.config.jax_platforms} leaves out: add cpu"
        ) from error
    with jax.default_device(cpu):
        config, params = load_model(found)
    inputs = list(_random_inputs(config, seed, min(64, max_length))) if random_tokens else []
    texts = _tokenize(found.tokenizer, TEXTS if prompt_texts is None else prompt_texts, config, max_length)
    if texts:
        inputs += [Input("text, a row each", texts), Input("text, packed", texts, packed=True)]
    if not inputs:
        raise UserError(f"{folder}: nothing to verify: no tokenizer.json or no text, and random_tokens is off")

    # The mathematics, in float64. Back ends that any device has; routings are kept for float32.
    wide = dataclasses.replace(config, compute_dtype="float64", attention="chunked")
    if config.moe is not None:
        wide = dataclasses.replace(wide, moe=dataclasses.replace(config.moe, backend="blocks"))
    with jax.enable_x64(True), jax.default_device(cpu):
        compared, departure = _compare_float64(params, wide, Reference(found, "float64"), inputs, tolerance)

    # The rounding, in float32.
    params, reference = jax.device_put(params, jax.devices()[0]), Reference(found, "float32")
    comparisons = [_add_float32_errors(params, config, reference, *one) for one in zip(inputs, compared, strict=True)]
    return VerifyReport(str(folder), tolerance, tuple(comparisons), departure)


class _Float64(NamedTuple):
    """What float32 is compared with, for one input."""

    comparison: Comparison
    exact: list[np.ndarray]  # the reference's logits [T, V] of each document
    keep: np.ndarray  # bool, of all documents' tokens: those that no tie leaves out
    routing: np.ndarray | None  # this side's experts [L, B, T, k]
    experts: list[list]  # the reference's of each document


def _compare_float64(
    params: dict, config: ModelConfig, reference: Reference, inputs: list[Input], tolerance: float
) -> tuple[list[_Float64], str]:
    """What every input gives, and where the first that differs departs."""
    compared, departure = [], ""
    for one in inputs:
        ours, routed = _our_logits(params, config, one)
        exact, experts = zip(*[reference.logits(doc, one.start, one.last) for doc in one.docs], strict=True)
        margins = None if routed is None else routed.margins
        comparison, keep = compare(one.name, ours, exact, margins, tolerance)
        compared.append(_Float64(comparison, exact, keep, None if routed is None else routed.expert_ids, experts))
        if not departure and not comparison.relative <= tolerance:
            departure = _find_departure(params, config, reference, one, tolerance)
    return compared, departure


def _add_float32_errors(
    params: dict, config: ModelConfig, reference: Reference, one: Input, wide: _Float64
) -> Comparison:
    ours, _ = _our_logits(params, config, one, wide.routing)
    of_docs = zip(one.docs, wide.experts, strict=True)
    theirs = [reference.logits(doc, one.start, one.last, experts)[0] for doc, experts in of_docs]
    exact = np.concatenate(wide.exact)[wide.keep]
    error = lambda side: float(np.abs(np.concatenate(side)[wide.keep] - exact).max()) / wide.comparison.scale
    return dataclasses.replace(wide.comparison, float32_error=error(ours), reference_float32_error=error(theirs))


def _check_memory(found: ModelFolder) -> None:
    """Raises UserError where the machine says that it has less memory than the weights of both sides take."""
    count = num_params(abstract_params(read_config(found.base)))
    needed, available = BYTES_A_PARAMETER * count, _available_memory()
    if needed > available:
        raise UserError(
            f"verify of {count / 1e9:.1f}e9 parameters needs {needed / 2**30:.0f} GiB of memory "
            f"({BYTES_A_PARAMETER} bytes each), found {available / 2**30:.0f} GiB: use a larger machine, or verify "
            "the architecture with --random --layers 4"
        )


def _available_memory() -> float:
    """Bytes; infinite where the system does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")


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
        yield Input("longer than the window", draw(1, window + length), last=length)


def compare(
    name: str,
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    margins: Sequence[np.ndarray] | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Comparison, np.ndarray]:
    """The float64 part of a Comparison, and bool [tokens of all documents], False for those left out.

    ``ours`` and ``theirs``: logits [T, V] of each document; ``margins``: [T], the least of any router's there.
    Raises UserError when theirs are all equal, or ties leave less than half of the tokens to compare.
    """
    b = np.concatenate(theirs)
    scale = float(b.std())
    if scale == 0:
        advice = "check the weights, expected those of a trained or a random model"
        raise UserError(f"verify: {name}: the reference's logits are all equal: {advice}")
    keep = np.ones(len(b), bool)
    if margins is not None:
        keep = np.concatenate([_decided(*doc, tolerance * scale) for doc in zip(ours, theirs, margins, strict=True)])
    if keep.mean() < 0.5:
        raise UserError(f"verify: {name}: routers are undecided before most tokens: try another seed, or fewer layers")
    a, b = np.concatenate(ours)[keep], b[keep]
    diff = float(np.abs(a - b).max())
    log_p, log_q = _log_softmax(b), _log_softmax(a)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    agreement = float((a.argmax(-1) == b.argmax(-1)).mean())
    kl_mean, kl_max = float(max(kl.mean(), 0)), float(max(kl.max(), 0))
    return Comparison(name, len(a), diff, scale, diff / scale, kl_mean, kl_max, agreement, int((~keep).sum())), keep


def _decided(ours: np.ndarray, theirs: np.ndarray, margins: np.ndarray, limit: float) -> np.ndarray:
    """Bool [T]: all, or those before the first token that differs, if rounding may have chosen an expert there."""
    wrong = ~(np.abs(ours - theirs).max(-1) <= limit)  # NaN is wrong, and no tie
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


class _Routed(NamedTuple):
    """What the routers of all layers did."""

    expert_ids: np.ndarray  # [L, B, T, k]
    margins: list[np.ndarray]  # [T] of each document's compared tokens: the least of any layer's


def _run(
    params: dict, config: ModelConfig, one: Input, routing: np.ndarray | None = None
) -> tuple[list[jax.Array], _Routed | None]:
    """Hidden states after the final norm, [T, D] of each document's compared tokens, and the routing; None without.

    ``routing``: the ``expert_ids`` of an earlier run, to send every token to the same experts again.
    """
    rows = [np.concatenate(one.docs)] if one.packed else one.docs
    length = max(len(row) for row in rows)
    tokens, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    spans, start = [], 0
    for i, doc in enumerate(one.docs):
        row, start = (0, start) if one.packed else (i, 0)
        span = slice(start, start + len(doc))
        tokens[row, span], segments[row, span], positions[row, span] = doc, i + 1, one.start + np.arange(len(doc))
        spans.append((row, slice(max(start, span.stop - one.last) if one.last else start, span.stop)))
        start += len(doc)
    with jax.default_matmul_precision("highest"):  # float32 products on accelerators too
        hidden, routed = _compute(params, config, tokens, segments, positions, routing)
    if routed is not None:
        margins = [np.asarray(routed.margins[:, row, span]).min(0, initial=np.inf) for row, span in spans]
        routed = _Routed(np.asarray(routed.expert_ids), margins)
    return [hidden[row, span] for row, span in spans], routed


_compute = jax.jit(compute_hidden_and_routing, static_argnums=1)


def _our_logits(
    params: dict, config: ModelConfig, one: Input, routing: np.ndarray | None = None
) -> tuple[list[np.ndarray], _Routed | None]:
    """Logits [T, V] of each document's compared tokens, and the routing."""
    hidden, routed = _run(params, config, one, routing)
    with jax.default_matmul_precision("highest"):
        logits = [np.asarray(compute_logits(params, config, rows))[:, : config.vocab_size] for rows in hidden]
    return logits, routed


def _find_departure(params: dict, config: ModelConfig, reference: Reference, one: Input, tolerance: float) -> str:
    """The first place where the hidden states differ.

    Both sides' states go through this side's final norm: compared on one scale, whatever a layer adds up to. Within
    the layer that departs, the reference's feed-forward is silenced on both sides: what still differs is attention.
    """
    normed = lambda states: np.asarray(rms_norm(jnp.asarray(states), params["final_norm"], config))

    if broken := name_broken(params):
        return f"in {broken}, which holds numbers that are not finite"
    one = one._replace(last=0)
    run_reference = lambda silenced: [reference.states(doc, one.start, silenced) for doc in one.docs]

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
        # The layer without what its feed-forward gives.
        name = "moe" if "moe" in layers else "mlp"
        down = jax.tree.map(lambda x, depth=depth: x.at[depth - 1].set(0), layers[name]["down"])
        silenced = layers | {name: layers[name] | {"down": down}}
        still = differ(depth, silenced, run_reference(depth - 1))
        part = "attention" if not still <= tolerance else "feed-forward" if config.moe is None else "experts"
        return f"in layer {depth - 1}, in its {part} {found}"
    return "in the final norm or the projection onto the vocabulary"
