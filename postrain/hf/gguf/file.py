"""Opening a GGUF file: whether it is whole, its metadata, its tensors.

The `gguf` package trusts the header: a file cut short gives an error of numpy, and a damaged, huge count keeps it busy
for hours. So the header is walked here first, and every length in it is compared with the length of the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import os
import pathlib
import struct
from typing import Any

import gguf

from postrain.errors import UserError

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4  # of ggml
MAX_NESTING = 4  # lists in lists; no writer known goes beyond 1
# Bytes of a value by its type in the file; strings and arrays say their own length.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
UINT32, STRING, ARRAY = 4, 8, 9
# Metadata of an architecture that are counts, and those that are numbers of any kind.
COUNTS = frozenset(
    "context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv "
    "attention.key_length attention.sliding_window attention.sliding_window_pattern".split()
)
NUMBERS = frozenset(
    "attention.layer_norm_rms_epsilon rope.freq_base rope.freq_base_swa rope.scaling.factor rope.scale_linear "
    "rope.dimension_count expert_count final_logit_softcapping".split()
)


def read_gguf(file: pathlib.Path) -> tuple[dict[str, gguf.ReaderTensor], dict[str, Any]]:
    """Tensors by name, mapped from the file, and metadata by name.

    Raises UserError when the file does not exist, is not a GGUF, is cut short or damaged.
    """
    if file.is_dir():
        advice = "give the .gguf file itself; the folder of a Hugging Face model needs no import"
        raise UserError(f"{file}: expected a GGUF file, found a folder: {advice}")
    if not file.is_file():
        raise UserError(f"{file}: expected a GGUF file, found nothing of that name: check the path")
    try:
        with open(file, "rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(f"{file}: does not start as a GGUF file does: download it again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Header(file, data).check()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: damaged, its header makes no sense: download it again") from error
    return {tensor.name: tensor for tensor in reader.tensors}, fields


class _Header:
    """A walk over the header, byte by byte as the format lays it out."""

    def __init__(self, file: pathlib.Path, data: mmap.mmap):
        self.file, self.data, self.at, self.order = file, data, 4, "<"

    def check(self) -> None:
        """Raises UserError unless the file has all the bytes that its header describes."""
        version = self._number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self.at, self.order = 4, ">"
            version = self._number("I")
        if version not in VERSIONS:
            found = f"is of GGUF version {version}, supported are {' and '.join(map(str, VERSIONS))}"
            raise UserError(f"{self.file}: {found}: convert the model again with a newer llama.cpp")
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        alignment = 32
        for _ in range(num_fields):
            name, kind = self._text(), self._number("I")
            if name == b"general.alignment" and kind == UINT32:
                alignment = self._number("I") or self._damaged("an alignment of 0")
            else:
                self._skip_values(kind, 1)
        ends = [self._tensor_end() for _ in range(num_tensors)]
        needed = -(-self.at // alignment) * alignment + max(ends, default=0)
        if needed > len(self.data):
            raise UserError(
                f"{self.file}: has {len(self.data):,} bytes, expected {needed:,} by its header: cut short or damaged: "
                "download it again"
            )

    def _tensor_end(self) -> int:
        """Bytes from the start of all tensors to the end of this one."""
        name, num_dimensions = self._text(), self._number("I")
        if num_dimensions > MAX_DIMENSIONS:
            self._damaged(f"a tensor of {num_dimensions} dimensions")
        shape = [self._number("Q") for _ in range(num_dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        sizes = {known.value: size for known, size in gguf.GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            where = f"{self.file}: tensor {name.decode(errors='replace')}"
            raise UserError(f"{where} is of type {kind}, which the gguf package does not know: update it, or download")
        block, num_bytes = sizes[kind]
        if not shape or shape[0] % block:
            self._damaged(f"a tensor of shape {shape} in blocks of {block}")
        return offset + math.prod(shape) // block * num_bytes

    def _skip_values(self, kind: int, count: int, nesting: int = 0) -> None:
        if kind in WIDTHS:
            self._skip(count * WIDTHS[kind])
        elif kind == STRING:
            for _ in range(count):
                self._text()
        elif kind == ARRAY:
            if nesting == MAX_NESTING:
                self._damaged(f"lists nested more than {MAX_NESTING} deep")
            for _ in range(count):
                self._skip_values(self._number("I"), self._number("Q"), nesting + 1)
        else:
            self._damaged(f"a value of type {kind}")

    def _text(self) -> bytes:
        length = self._number("Q")
        self._skip(length)
        return self.data[self.at - length : self.at]

    def _number(self, kind: str) -> int:
        self._skip(struct.calcsize(kind))
        return struct.unpack_from(self.order + kind, self.data, self.at - struct.calcsize(kind))[0]

    def _skip(self, num_bytes: int) -> None:
        if self.at + num_bytes > len(self.data):
            end = f"its {len(self.data):,} bytes end inside the header"
            raise UserError(f"{self.file}: {end}: cut short or damaged: download it again")
        self.at += num_bytes

    def _damaged(self, what: str):
        where = f"at byte {self.at:,} of {len(self.data):,}"
        raise UserError(f"{self.file}: damaged, {what} {where}: download it again")


def check_fields(fields: dict[str, Any], architecture: str, where: str | os.PathLike) -> None:
    """Raises UserError, naming the field, when one that the import reads is of another kind than it must be."""
    for name, value in fields.items():
        key = name.removeprefix(f"{architecture}.")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if key in COUNTS and not (number and isinstance(value, int) and value > 0):
            raise UserError(f"{where}: {name} is {_short(value)}, expected a whole number above 0")
        if key in NUMBERS and not number:
            raise UserError(f"{where}: {name} is {_short(value)}, expected a number")
    tokens = _list_of(fields, "tokens", str, where)
    _list_of(fields, "scores", int | float, where, len(tokens))
    _list_of(fields, "token_type", int, where, len(tokens))
    for merge in _list_of(fields, "merges", str, where):
        if merge.count(" ") != 1:
            raise UserError(f"{where}: tokenizer.ggml.merges has {_short(merge)}, expected two tokens and a space")
    for part in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        index = fields.get(f"tokenizer.ggml.{part}_token_id", 0)
        # Padding beyond the vocabulary occurs, and is left out.
        if not isinstance(index, int) or index < 0 or (tokens and index >= len(tokens) and part != "padding"):
            expected = f"the number of one of the {len(tokens)} tokens"
            raise UserError(f"{where}: tokenizer.ggml.{part}_token_id is {_short(index)}, expected {expected}")


def _list_of(fields: dict, key: str, kind, where: str | os.PathLike, length: int | None = None) -> list:
    name = f"tokenizer.ggml.{key}"
    value = fields.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UserError(f"{where}: {name} is {_short(value)}, expected a list of another kind: download it again")
    if value and length is not None and len(value) != length:
        raise UserError(f"{where}: {name} has {len(value)} values, expected one for each of the {length} tokens")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
