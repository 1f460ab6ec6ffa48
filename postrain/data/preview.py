"""Preview of the training data, as text or HTML: rows with their trained tokens marked, counts, packing, lengths."""

import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup, escape

from postrain.config import Config, find_row_kind, format_reader
from postrain.data.batches.in_memory import ExampleSet, load_examples
from postrain.data.batches.open import sample_stream
from postrain.data.batches.row_filter import count
from postrain.data.documents import AS_RENDERED, Document, Preparation, Rendered
from postrain.data.kinds.registry import SFT, needs_tokenizer
from postrain.data.rendering.render import decode_parts
from postrain.data.rendering.tokenizer import Tokenizer, load_run_tokenizer
from postrain.data.reward_weights import RewardWeights
from postrain.errors import UserError
from postrain.files import check_writable, write_whole
from postrain.report.page import render_page

_HISTOGRAM_BINS = 12
_BAR_WIDTH = 40
_TRAINED_STYLE = "background:#c9f2d3;border-radius:2px"
_SPELT_STYLE = "color:#b00020;text-decoration:underline dotted"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: they could control the terminal


def preview(
    config: Config,
    html_path: str | os.PathLike | None = None,
    rows: int = 3,
    color: bool | None = None,
    preparation: Preparation = AS_RENDERED,
    describe: Callable[[Sequence[Document]], Sequence[str]] | None = None,
) -> str:
    """Loads ``config.data`` as training does, and formats its counts, lengths and some of its documents.

    Args:
      html_path: a file for a self-contained page with the same content.
      rows: documents shown in full, spread evenly over ``data.train``.
      color: trained tokens in colour, or between marks. None: colour if standard output is a terminal and
        NO_COLOR is not set.
      preparation: that the recipe's documents go through, ``recipes.find_preparation``; but weights by rewards, which
        are always shown.
      describe: what the recipe says of ``data.train``; its UserError is shown, not raised, as the rows then are to be
        looked at.

    Returns:
      The text to print.

    Raises:
      UserError: as ``load_tokenizer`` and ``load_examples``.
    """
    reads_text = needs_tokenizer((*config.data.train, *config.data.eval))
    if reads_text and not (config.model.tokenizer or config.model.path):
        raise UserError("config key 'model.path' is empty: give a Hugging Face folder, its tokenizer renders the data")
    if html_path is not None:
        check_writable(html_path, "--html")
    tokenizer = load_run_tokenizer(config, config.model.path) if reads_text else None
    sets, notes = _load_train(config, tokenizer, preparation)
    kind, examples = next(iter(sets.values())).kind, next(iter(sets.values())).examples
    wanted = find_row_kind(config)
    if kind.name != wanted and format_reader(kind.name):
        raise UserError(
            f"config key 'data.train': rows of kind {kind.name}, but recipe {config.recipe!r} reads rows of kind "
            f"{wanted}; they are for {format_reader(kind.name, wanted)}"
        )
    if describe is not None and not config.data.streaming and not _format_lists(sets["data.train"], config):
        notes["data.train"] += _describe(examples, config, describe)
    if config.data.eval:
        sets["data.eval"] = load_examples(config.data.eval, tokenizer, config.data, preparation=preparation)
    picked = np.unique(np.linspace(0, len(examples) - 1, min(rows, len(examples))).astype(int)) if rows > 0 else []
    shown, reader = [examples[i] for i in picked], tokenizer if kind.is_text else None
    if html_path is not None:
        _write_html(pathlib.Path(html_path), sets, notes, shown, reader, config)
    color = use_color() if color is None else color
    blocks = [
        "\n".join([key, str(s.report), *notes.get(key, ()), *_format_lists(s, config)]) + f"\n\n{_format_histogram(s)}"
        for key, s in sets.items()
    ]
    return "\n\n".join([*blocks, *_format_rows(shown, reader, color)])


def _format_rows(documents: Sequence[Document], reader: Tokenizer | None, color: bool) -> list[str]:
    """What the marks mean, and the documents in full; nothing where there are none."""
    if not documents:
        return []
    legend = "trained tokens are " + (_mark("coloured", color) if color else "between " + _mark(" and ", color))
    if any(_spells_control(s, reader) for document in documents for s in document.sequences):
        spelt = _mark_spelt("underlined", color) if color else "between " + _mark_spelt(" and ", color)
        legend += f"; control tokens that a row spells, ordinary text to the model, are {spelt}"
    return [legend] + [
        f"--- {_format_header(document)}"
        + "".join(f"\n{_format_note(s)}{_format_tokens(s, reader, color)}" for s in document.sequences)
        for document in documents
    ]


def _load_train(
    config: Config, tokenizer: Tokenizer | None, preparation: Preparation
) -> tuple[dict[str, ExampleSet], dict[str, list[str]]]:
    """``data.train``, of a stream its first rows, and further lines about it, both by what is shown as its name."""
    weights, data = RewardWeights(config), config.data
    expected = None
    if weights.preparation.keys:
        preparation, expected = weights.preparation, SFT.name
    if data.streaming:
        sample = sample_stream(tokenizer, data, kind=expected, preparation=preparation)
        return {"data.train (the first rows)": sample}, {}
    whole = load_examples(data.train, tokenizer, data, kind=expected, preparation=preparation)
    return {"data.train": whole}, {"data.train": weights.summary.splitlines()}


def _describe(
    documents: Sequence[Document], config: Config, describe: Callable[[Sequence[Document]], Sequence[str]]
) -> list[str]:
    try:
        return list(describe(documents))
    except UserError as error:
        return [f"recipe {config.recipe!r} would refuse the rows: {error}"]


def _format_lists(example_set: ExampleSet, config: Config) -> list[str]:
    """A line about rows that the recipe would refuse: of scored answers it reads two."""
    lists = [document for document in example_set.examples if len(document.sequences) > 2]
    for_lists = {"preference": "softmax", "reward": "plackett_luce"}.get(config.recipe, "")
    if not lists or not for_lists or getattr(config, config.recipe).loss == for_lists:
        return []
    return [
        f"recipe {config.recipe!r} reads two answers to a prompt, and would refuse {count(len(lists), 'row')} with "
        f"more, the first at {lists[0].ref}: make rows of two out of longer lists, or set "
        f"'{config.recipe}.loss' to {for_lists!r}"
    ]


def use_color() -> bool:
    """Whether to print in colour: a terminal, and no NO_COLOR (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def render_tokens_html(rendered: Rendered, tokenizer: Tokenizer | None) -> Markup:
    """A sequence as HTML that needs no style sheet: its text, or ids without a tokenizer, trained tokens on green.

    Control tokens that the row spells, which are ordinary text to the model, are underlined with dots.
    """
    trained_span = Markup(f'<span style="{_TRAINED_STYLE}" title="{{}}">{{}}</span>')
    spelt_span = Markup(f'<i style="{_SPELT_STYLE}" title="spelt in the row: ordinary text">{{}}</i>')
    spans = []
    for parts, trained, length in _runs(rendered, tokenizer):
        shown = [spelt_span.format(_visible(t)) if is_spelt else escape(_visible(t)) for t, is_spelt in parts]
        text = Markup("").join(shown)
        spans.append(trained_span.format(count(length, "trained token"), text) if trained else text)
    return Markup('<pre style="white-space:pre-wrap;overflow-wrap:anywhere">{}</pre>').format(Markup("").join(spans))


def _runs(rendered: Rendered, tokenizer: Tokenizer | None):
    """(parts as of ``decode_parts``, trained, number of tokens) of each stretch of tokens with the same mask."""
    start = 0
    for trained, run in itertools.groupby(rendered.loss_mask.tolist()):
        length = len(list(run))
        ids = rendered.tokens[start : start + length]
        parts = decode_parts(ids, tokenizer) if tokenizer else [(" ".join(map(str, ids)) + " ", False)]
        yield parts, trained, length
        start += length


def _visible(text: str) -> str:
    """Control characters as visible symbols: a row must not control the terminal."""
    return _CONTROL.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 0x20 else "\ufffd", text)


def _mark(text: str, color: bool) -> str:
    return f"\x1b[1;32m{text}\x1b[0m" if color else f"\u27e6{text}\u27e7"


def _mark_spelt(text: str, color: bool) -> str:
    return f"\x1b[4m{text}\x1b[24m" if color else f"\u2039{text}\u203a"


def _spells_control(rendered: Rendered, tokenizer: Tokenizer | None) -> bool:
    return any(is_spelt for parts, *_ in _runs(rendered, tokenizer) for _, is_spelt in parts)


def _format_tokens(rendered: Rendered, tokenizer: Tokenizer | None, color: bool) -> str:
    out = []
    for parts, trained, _ in _runs(rendered, tokenizer):
        text = "".join(_mark_spelt(_visible(t), color) if is_spelt else _visible(t) for t, is_spelt in parts)
        out.append(_mark(text, color) if trained else text)
    return "".join(out)


def _format_header(document: Document) -> str:
    trained, tokens = document.num_trained, document.num_tokens
    return f"{document.ref}  {count(tokens, 'token')}, {trained:,} trained ({trained / tokens:.1%})"


def _format_note(sequence: Rendered) -> str:
    """A line with the metadata and fields of a sequence, to stand above its tokens; "" where it has neither."""
    notes = [f"metadata {json.dumps(sequence.metadata, ensure_ascii=False, default=str)}"] * bool(sequence.metadata)
    for name, values, _ in sequence.fields:
        flat = values.ravel()
        some = " ".join(f"{v:g}" for v in flat[:8].tolist()) + " ..." * (len(flat) > 8)
        notes.append(f"{name} {flat[0]:g}" if (flat == flat[0]).all() else f"{name} {some}")
    return f"[{_visible('; '.join(notes))}]\n" if notes else ""


def _histogram(example_set: ExampleSet) -> list[tuple[str, int]]:
    lengths = np.array([document.num_tokens for document in example_set.examples])
    width = -(-int(lengths.max()) // _HISTOGRAM_BINS)
    counts = np.bincount((lengths - 1) // width, minlength=1)
    return [(f"{i * width + 1:,} - {(i + 1) * width:,}", int(n)) for i, n in enumerate(counts)]


def _format_histogram(example_set: ExampleSet) -> str:
    bins = _histogram(example_set)
    label = max(len(name) for name, _ in bins)
    most = max(number for _, number in bins)
    lines = [f"{name.rjust(label)} |{'#' * -(-number * _BAR_WIDTH // most)} {number:,}" for name, number in bins]
    return "\n".join(["documents by length in tokens", *lines])


def _write_html(
    path: pathlib.Path,
    sets: dict[str, ExampleSet],
    further: dict[str, list[str]],
    shown: list[Document],
    tokenizer: Tokenizer | None,
    config: Config,
) -> None:
    tables = []
    for name, example_set in sets.items():
        header, *lines = example_set.report.table()
        notes = [*example_set.report.format_notes(), *further.get(name, ()), *_format_lists(example_set, config)]
        table = {"name": name, "header": header, "lines": lines, "notes": notes}
        tables.append(table | {"histogram": _histogram(example_set)})
    spelt_style = _SPELT_STYLE if any(_spells_control(s, tokenizer) for d in shown for s in d.sequences) else ""
    documents = [
        {
            "header": _format_header(document),
            "sequences": [(_format_note(s), render_tokens_html(s, tokenizer)) for s in document.sequences],
        }
        for document in shown
    ]
    styles = {"trained_style": _TRAINED_STYLE, "spelt_style": spelt_style}
    page = render_page("postrain.data", "preview.html.j2", sets=tables, documents=documents, **styles)
    write_whole(path, page)
