"""What runs on this machine's cluster really took: a file that later plans use.

One line of JSON a stage, keyed by GPU, engine and versions; the plan's own figures lie beside the
measured ones, so that a line says by how much the plan was off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from statistics import median

from dtrain.core.cache_paths import cache_folder

NAME = "calibration.jsonl"
FIGURES = ("peak", "speed", "planned_peak", "planned_speed")
LEAST_SHARE = 0.25  # of a stage's memory that an earlier one must have taken to tell of it
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")


@dataclass(frozen=True)
class CalibrationRecord:
    """One stage of one run.

    Attributes:
        gpu: its name in the plan's table, or as its driver says.
        peak, speed: measured: bytes of a rank, tokens a second of all ranks.
        planned_peak, planned_speed: what the plan says of the same.
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
    """Earlier runs on the same GPU, engine and versions.

    Attributes:
        memory_ratio: the greatest of measured over planned.
        speed_ratio: the median.
    """

    stages: int
    memory_ratio: float
    speed_ratio: float

    @property
    def memory_factor(self) -> float:
        """What the plan's tensors are multiplied by, before the allocator's factor; never less."""
        return max(1.0, self.memory_ratio)


def calibration_file() -> Path:
    """Where the lines lie."""
    return cache_folder() / NAME


@cache
def versions(packages: Sequence[str] = PACKAGES) -> str:
    """Versions of what decides memory and speed, without importing any of it."""
    found = []
    for package in packages:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def append(line: CalibrationRecord) -> None:
    """Add a line; whole or not at all, since a line is one write."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(asdict(line)) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def lines() -> tuple[CalibrationRecord, ...]:
    """All of them; those that cannot be read are passed over."""
    path = calibration_file()
    try:
        now = path.stat()
        return _lines(path, (now.st_mtime_ns, now.st_size))
    except OSError:
        return ()


@lru_cache(maxsize=1)  # a plan asks for each of its many variants
def _lines(path: Path, stamp: tuple[int, int]) -> tuple[CalibrationRecord, ...]:
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, OverflowError):
            line = json.loads(text)
            found.append(CalibrationRecord(**line | {name: float(line[name]) for name in FIGURES}))
    return tuple(found)


def measured(gpu: str, engine: str, method: str, planned_peak: float) -> Correction | None:
    """What earlier runs say; None if there were none.

    Runs of much smaller models are passed over: their memory is mostly libraries' workspaces, and
    their speed that of launching kernels.

    Args:
        planned_peak: bytes that the plan says of the stage in question.
    """
    key = (gpu, engine, method, versions())
    fit = [x for x in lines() if (x.gpu, x.engine, x.method, x.versions) == key]
    fit = [x for x in fit if all(0 < getattr(x, name) < inf for name in FIGURES)]
    fit = [x for x in fit if x.planned_peak >= LEAST_SHARE * planned_peak]
    if not fit:
        return None
    return Correction(
        len(fit),
        max(x.peak / x.planned_peak for x in fit),
        median(x.speed / x.planned_speed for x in fit),
    )
