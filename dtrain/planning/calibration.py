"""Measured memory and speed of finished stages, which correct later plans on this machine.

The file has one line of JSON for each stage: GPU, engine, method and library versions, what the
stage needed, and what the plan had predicted.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from math import inf
from pathlib import Path
from statistics import median

from dtrain.core.cache_paths import cache_folder
from dtrain.core.errors import UserError
from dtrain.core.files import read_json_lines
from dtrain.core.lazy_import import installed_versions
from dtrain.core.ownership import open_in_place

FILE_NAME = "calibration.jsonl"
FIGURES = ("peak", "speed", "planned_peak", "planned_speed")
MIN_SIZE_RATIO = 0.25  # of an earlier stage's planned memory to that of the stage in question
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")


@dataclass(frozen=True)
class CalibrationRecord:
    """One finished stage.

    Attributes:
        gpu: name in the plan's table, or the driver's name.
        peak: measured peak memory of a rank, in bytes.
        speed: measured tokens a second of all ranks.
        planned_peak, planned_speed: the plan's figures for both.
    """

    gpu: str
    engine: str
    method: str
    versions: str
    base: str
    peak: float
    speed: float
    planned_peak: float
    planned_speed: float


@dataclass(frozen=True)
class Correction:
    """What earlier stages on the same GPU, engine, method and versions say of the plan.

    Attributes:
        stages: how many there were.
        memory_ratio: greatest ratio of measured to planned memory.
        speed_ratio: median ratio of measured to planned speed.
    """

    stages: int
    memory_ratio: float
    speed_ratio: float

    @property
    def memory_factor(self) -> float:
        """The factor for the plan's tensors, at least 1."""
        return max(1.0, self.memory_ratio)


def calibration_file() -> Path:
    """The path of the file."""
    return cache_folder() / FILE_NAME


@cache
def versions() -> str:
    """Installed versions of the packages that decide memory and speed, without importing them."""
    return ", ".join(f"{name} {version}" for name, version in installed_versions(PACKAGES).items())


def append_record(record: CalibrationRecord) -> None:
    """Append a record in a single write, so that a line is whole or missing."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(asdict(record)) + "\n").encode()
    handle = open_in_place(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600, any_owner=True)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def load_records() -> tuple[CalibrationRecord, ...]:
    """All records; lines that cannot be read are skipped."""
    path = calibration_file()
    try:
        status = path.stat()
        return _parse(path, (status.st_mtime_ns, status.st_size))
    except (OSError, UserError):
        return ()


@lru_cache(maxsize=1)  # a plan asks again for each of its many variants
def _parse(path: Path, stamp: tuple[int, int]) -> tuple[CalibrationRecord, ...]:
    records = []
    for line in read_json_lines(path):
        with suppress(ValueError, TypeError, KeyError, OverflowError):
            records.append(
                CalibrationRecord(**line | {name: float(line[name]) for name in FIGURES})
            )
    return tuple(records)


def find_correction(gpu: str, engine: str, method: str, planned_peak: float) -> Correction | None:
    """The correction from earlier stages; None if there were none.

    Stages with much smaller models are skipped: their memory is mostly the libraries' workspaces,
    and their speed that of launching kernels.

    Args:
        planned_peak: the plan's bytes for the stage in question.
    """
    key = (gpu, engine, method, versions())
    alike = [x for x in load_records() if (x.gpu, x.engine, x.method, x.versions) == key]
    alike = [x for x in alike if all(0 < getattr(x, name) < inf for name in FIGURES)]
    alike = [x for x in alike if x.planned_peak >= MIN_SIZE_RATIO * planned_peak]
    if not alike:
        return None
    return Correction(
        len(alike),
        max(x.peak / x.planned_peak for x in alike),
        median(x.speed / x.planned_speed for x in alike),
    )
