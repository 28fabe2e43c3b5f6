"""starts.jsonl of a run folder: when and where each attempt of the ranks began, and with what.

An attempt may end in any way, so its end is the last sign of life: the newest line of its metrics.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dtrain
from dtrain.core.files import read_json_lines
from dtrain.core.ownership import open_in_place
from dtrain.core.run_dir import METRICS, RunDir

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets")
GIT_SECONDS = 5.0


@dataclass(frozen=True)
class Start:
    """A start of the ranks.

    Attributes:
        started: seconds since 1970.
        host: of the first rank.
        nodes, ranks: how many.
        device: "cpu", or the GPU's name.
        job: Slurm's id; empty outside Slurm.
        versions: of Python, dtrain and the libraries; `commit` if dtrain is a git checkout.
        previous_ended: last sign of life of the attempt before; None for the first.
    """

    started: float
    host: str
    nodes: int
    ranks: int
    device: str
    job: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    previous_ended: float | None = None

    @property
    def gpus(self) -> int:
        """GPUs in use; 0 on CPUs."""
        return 0 if self.device == "cpu" else self.ranks


def record_start(run: RunDir, *, nodes: int, ranks: int, device: str) -> None:
    """Add this attempt to a run's starts; called on the first rank."""
    start = Start(
        started=round(time.time(), 3),
        host=platform.node(),
        nodes=nodes,
        ranks=ranks,
        device=device,
        job=os.environ.get("SLURM_JOB_ID", ""),
        versions=software_versions(),
        previous_ended=_last_change(run) if run.starts.exists() else None,
    )
    handle = open_in_place(run.starts, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(start)) + "\n")


def read_starts(run: RunDir) -> list[Start]:
    """The starts of a run, oldest first; lines that cannot be read are skipped."""
    try:
        records = read_json_lines(run.starts)
    except OSError:
        return []
    return [start for record in records if (start := _start(record)) is not None]


@dataclass(frozen=True)
class AttemptTimes:
    """An attempt in the report.

    Attributes:
        ended: seconds since 1970.
        steps: by stage, those that it made and no later attempt repeated.
    """

    start: Start
    ended: float
    steps: dict[str, int]

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return max(0.0, self.ended - self.start.started)


def attempts_of(
    starts: Sequence[Start], metrics: dict[str, list[dict[str, Any]]]
) -> list[AttemptTimes]:
    """The attempts of a run with their ends and steps.

    Args:
        metrics: lines of each stage's metrics.jsonl.
    """
    times = [
        (float(line["time"]), stage)
        for stage, lines in metrics.items()
        for line in lines
        if isinstance(line.get("time"), int | float)
    ]
    attempts = []
    for number, start in enumerate(starts):
        after = starts[number + 1] if number + 1 < len(starts) else None
        limit = after.started if after else float("inf")
        mine = [(at, stage) for at, stage in times if start.started <= at < limit]
        ends = [at for at, _ in mine] + [start.started]
        if after is not None and after.previous_ended is not None:
            ends.append(min(after.previous_ended, after.started))
        steps: dict[str, int] = {}
        for _, stage in mine:
            steps[stage] = steps.get(stage, 0) + 1
        attempts.append(AttemptTimes(start, max(ends), steps))
    return attempts


def _start(record: dict[str, Any]) -> Start | None:
    try:
        start = Start(**record)
    except TypeError:
        return None
    numbers = (start.started, start.ranks, start.nodes, start.previous_ended or 0.0)
    texts = (start.host, start.device, start.job)
    valid = all(isinstance(n, int | float) for n in numbers) and isinstance(start.versions, dict)
    return start if valid and all(isinstance(text, str) for text in texts) else None


def _last_change(run: RunDir) -> float | None:
    """When a file of the run's metrics last changed."""
    times = []
    for path in run.path.glob(f"*/{METRICS}"):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return round(max(times), 3) if times else None


def software_versions() -> dict[str, str]:
    """Versions of dtrain, Python and the libraries, without importing them; dtrain's commit."""
    versions = {"dtrain": dtrain.__version__}
    if commit := _commit():
        versions["commit"] = commit
    versions["python"] = platform.python_version()
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _commit() -> str:
    """The commit of dtrain's own checkout; empty if it was installed otherwise."""
    root = Path(dtrain.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=GIT_SECONDS
        )
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""
