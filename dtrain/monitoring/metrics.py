"""metrics.jsonl: one line a step, written at once, and never a number that was not measured."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any, TypeGuard

from dtrain.core.files import json_line, read_json_lines, write_atomic
from dtrain.core.ownership import open_in_place
from dtrain.monitoring.run_files import MetricsLine, NumberedLine


class Metrics:
    """The metrics of one stage, open for writing.

    Lines of steps after `resume_at` were written by a run that was stopped before it saved: they
    are dropped, so that no step occurs twice. So is a last line that was cut off.
    """

    def __init__(self, path: Path, resume_at: int) -> None:
        self.path = path
        lines = read_json_lines(path, NumberedLine)  # reports read less than what is kept
        kept = [line for line in lines if line["step"] <= resume_at]
        write_atomic(path, "".join(json_line(finite(record)) for record in kept))
        handle = open_in_place(path, os.O_WRONLY | os.O_APPEND)
        self._file = open(handle, "w", encoding="utf-8")  # noqa: SIM115 - held until close()

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`, which names its `step`; NaN and infinity become null."""
        assert isinstance(record.get("step"), int), record
        self._file.write(json_line(finite(record)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; none if it is not there, and no broken ones."""
    return read_json_lines(path, MetricsLine)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a number that a float can be; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # not true for NaN


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
