"""What every reader of rows does with a row."""

import json
from typing import Any

from postrain.data.messages import BadRow, RowRef


def decode_line(data: bytes, ref: RowRef, *, first: bool) -> Any:
    """The value of a line of JSON; ``first`` of its file, where a byte order mark may stand. Raises BadRow."""
    try:
        return json.loads(data.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as e:
        raise BadRow(ref, f"not UTF-8: byte 0x{data[e.start]:02x} at byte {e.start + 1} of the line") from None
    except json.JSONDecodeError as e:
        hint = "; one JSON object per line is expected, not a list" if first and data[:1] == b"[" else ""
        raise BadRow(ref, f"invalid JSON: {e.msg} at column {e.colno}{hint}") from None
    except (ValueError, RecursionError) as e:
        raise BadRow(ref, f"invalid JSON: {e}") from None


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
