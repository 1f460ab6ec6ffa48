"""Lists of numbers in a row, checked: what the kinds kd and events read in place of text."""

from typing import Any

import numpy as np

from postrain.data.bad_row import BadRow, RowRef

MAX_ID = 2**31 - 1  # int32


def parse_ids(
    values: Any, where: str, ref: RowRef, *, least: int = 0, length: int | None = None, largest: int = MAX_ID
) -> np.ndarray:
    """int32 [L], or int64 where ``largest`` exceeds int32, from a list of whole numbers. Raises BadRow."""
    array = _to_array(values, where, ref)
    if array.ndim != 1:
        raise BadRow(ref, f"{where} must be a list of numbers; found lists in it")
    if length is not None and len(array) != length:
        raise BadRow(ref, f"{where} has {len(array)} entries, expected {length}: one for each")
    if len(array) < least:
        raise BadRow(ref, f"{where} must have at least {least} entries; found {len(array)}")
    if len(array) and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() > largest):
        values = array.tolist()
        wrong = next((v for v in values if not isinstance(v, int) or not 0 <= v <= largest), values[0])
        raise BadRow(ref, f"{where} must be whole numbers from 0 to {largest:,}; found {wrong!s:.40}")
    return array.astype(np.int32) if largest <= MAX_ID else array.astype(np.int64)


def parse_numbers(values: Any, where: str, length: int, ref: RowRef) -> np.ndarray:
    """float64 [L] from a list of numbers. Raises BadRow."""
    array = _to_array(values, where, ref)
    if array.shape != (length,) or array.dtype.kind not in "iuf":
        raise BadRow(ref, f"{where} must be a list of {length} numbers, one for each token")
    return array.astype(np.float64)


def parse_table(values: Any, where: str, length: int, ref: RowRef) -> np.ndarray:
    """[L, K] numbers, a copy that the caller may change. Raises BadRow."""
    table = _to_array(values, where, ref)
    if len(table) != length:
        raise BadRow(ref, f"{where} has {len(table)} entries, expected {length}: one for each token")
    if table.ndim != 2 or not table.shape[1] or table.dtype.kind not in "iuf":
        raise BadRow(ref, f"{where} must be a list of K numbers for each token")
    return table


def _to_array(values: Any, where: str, ref: RowRef) -> np.ndarray:
    # A user's function may return arrays in place of lists.
    is_list = isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.ndim > 0)
    if not is_list:
        raise BadRow(ref, f"{where} must be a list; found {'nothing' if values is None else repr(values)[:40]}")
    try:
        return np.array(values)
    except (ValueError, OverflowError):
        raise BadRow(
            ref, f"{where} must have as many numbers in each entry; found entries of different length"
        ) from None
