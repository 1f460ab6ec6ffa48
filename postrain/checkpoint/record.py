"""What a checkpoint holds beside the arrays of the train state: run/data.json."""

import dataclasses
import pathlib
from typing import Any

from postrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a checkpoint holds beside the train state; all of it JSON."""

    step: int  # of the loop, which may have made more updates or fewer
    data_position: dict[str, Any]
    config: dict[str, Any]  # resolved
    data_fingerprint: dict[str, Any]
    model_fingerprint: dict[str, Any] | None
    held_out_fingerprint: dict[str, Any] | None = None  # None: no held-out rows
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of this step
    pending_metrics: dict[str, float] | None = None  # a line not yet written, since its evaluation was interrupted
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the files that a run appends to


def parse_record(folder: pathlib.Path, values: Any) -> RunRecord:
    """The record that a checkpoint's run/data.json holds. Raises UserError where another version wrote it."""
    names = {field.name for field in dataclasses.fields(RunRecord)}
    if not isinstance(values, dict) or values.keys() != names:
        raise UserError(
            f"{folder}: another version of postrain wrote this checkpoint: resume with that version, or use another "
            "workdir"
        )
    return RunRecord(**values)
