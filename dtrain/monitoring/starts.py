"""starts.jsonl of a run folder: each start of the ranks, until its end.

A start adds a line, with the environment that it runs in, and so does its end. A killed one has no
second line: it ended with its last sign of life, the newest line of its metrics. An attempt has
several starts if a launcher starts its ranks again.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

import dtrain
from dtrain.core.errors import UserError
from dtrain.core.files import read_json_lines
from dtrain.core.hardware import driver_versions
from dtrain.core.hashes import fingerprint
from dtrain.core.lazy_import import installed_versions
from dtrain.core.ownership import open_in_place
from dtrain.core.processes import output_file
from dtrain.core.run_dir import RunDir
from dtrain.core.stage_dir import METRICS
from dtrain.launching.commands import COMMAND
from dtrain.monitoring.metrics import is_number

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets")
GIT_SECONDS = 5.0
REASON_CHARACTERS = 300
LOST = "lost"  # the outcome of a start without an end
# Variables in which launchers and Slurm give all ranks of one start the same values, and those of
# the next start others. Times would compare the clocks of a node and of the file server.
START_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
)


def start_id(environ: Mapping[str, str]) -> str:
    """An id that all ranks of this start share."""
    return fingerprint([environ.get(name, "") for name in START_VARIABLES])[:32]


@dataclass(frozen=True)
class Start:
    """A start of the ranks, and its end.

    Attributes:
        started: seconds since 1970.
        host: of the first rank.
        nodes, ranks: how many.
        device: of the first rank: "cpu", or the GPU's name.
        job: Slurm's id; empty outside Slurm.
        hosts: name of each node → the devices that it trains on, such as "8 x NVIDIA H100".
        versions: of Python, dtrain, the libraries, CUDA and the driver; `commit` if dtrain is a git
            checkout.
        command: that was typed or submitted.
        output: file or terminal that the first rank prints to; empty if unknown.
        start: see `start_id`.
        previous_ended: last sign of life of the start before; None for the first.
        ended: seconds since 1970; None while it runs, and if it was killed.
        outcome: finished, interrupted or failed; empty without an end.
        reason: why it ended, in one line.
    """

    started: float
    host: str
    nodes: int
    ranks: int
    device: str
    job: str = ""
    hosts: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    output: str = ""
    start: str = ""
    previous_ended: float | None = None
    ended: float | None = None
    outcome: str = ""
    reason: str = ""

    @property
    def gpus(self) -> int:
        """GPUs in use; 0 on CPUs."""
        return 0 if self.device == "cpu" else self.ranks


def _began() -> float:
    """When this process began, in seconds since 1970; without /proc, now."""
    with suppress(psutil.Error, OSError):
        return psutil.Process().create_time()
    return time.time()


END_FIELDS = ("start", "ended", "outcome", "reason")


def record_start(
    run: RunDir,
    *,
    nodes: int,
    ranks: int,
    device: str,
    hosts: Mapping[str, str] | None = None,
    cuda: str | None = None,
) -> None:
    """Add this start to a run's; called on the first rank.

    Args:
        hosts: see `Start`.
        cuda: the version of CUDA that torch was built for.
    """
    start = Start(
        started=round(_began(), 3),
        host=platform.node(),
        nodes=nodes,
        ranks=ranks,
        device=device,
        job=os.environ.get("SLURM_JOB_ID", ""),
        hosts=dict(hosts or {}),
        versions=software_versions() | ({"cuda": cuda} if cuda else {}) | driver_versions(),
        command=os.environ.get(COMMAND) or shlex.join(sys.orig_argv),
        output=output_file(1),
        start=start_id(os.environ),
        previous_ended=_last_change(run) if run.starts.exists() else None,
    )
    values = {k: v for k, v in asdict(start).items() if k == "start" or k not in END_FIELDS}
    _append(run, values)


def record_end(run: RunDir, start: str, outcome: str, reason: str) -> None:
    """Add the end of the start with this id; a later one replaces it.

    Raises:
        OSError: it cannot be written.
    """
    lines = [line.strip() for line in reason.split("\n") if line.strip()] or [""]
    line = lines[-1] if "Traceback" in lines[0] else lines[0]
    values = (start, round(time.time(), 3), outcome, line[:REASON_CHARACTERS])
    _append(run, dict(zip(END_FIELDS, values, strict=True)))


def _append(run: RunDir, values: dict[str, Any]) -> None:
    handle = open_in_place(run.starts, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_starts(run: RunDir) -> list[Start]:
    """The starts of a run, oldest first; lines that cannot be read are skipped."""
    starts: list[Start] = []
    try:
        records = read_json_lines(run.starts)
    except UserError:
        return []
    for record in records:
        if record.keys() == set(END_FIELDS):
            _add_end(starts, record)
        elif (start := _start(record)) is not None:
            starts.append(start)
    return starts


def _add_end(starts: list[Start], end: dict[str, Any]) -> None:
    """Put an end into the newest start with its id."""
    is_end = is_number(end["ended"]) and isinstance(end["outcome"], str)
    for number in reversed(range(len(starts))):
        if is_end and starts[number].start == end["start"]:
            starts[number] = replace(starts[number], **{**end, "reason": str(end["reason"])})
            return


@dataclass(frozen=True)
class TimedStart:
    """A start, with what it did.

    Attributes:
        ended: seconds since 1970.
        steps: by stage, those that it made and no later start repeated.
    """

    start: Start
    ended: float
    steps: dict[str, int]

    @property
    def seconds(self) -> float:
        """Time from its start to its end."""
        return max(0.0, self.ended - self.start.started)


def timed_starts(
    starts: Sequence[Start], metrics: dict[str, list[dict[str, Any]]]
) -> list[TimedStart]:
    """The starts of a run with their ends and steps.

    Args:
        metrics: lines of each stage's metrics.jsonl.
    """
    times = [
        (float(line["time"]), stage)
        for stage, lines in metrics.items()
        for line in lines
        if isinstance(line.get("time"), int | float)
    ]
    timed = []
    for number, start in enumerate(starts):
        after = starts[number + 1] if number + 1 < len(starts) else None
        limit = after.started if after else float("inf")
        mine = [(at, stage) for at, stage in times if start.started <= at < limit]
        ends = [at for at, _ in mine] + [start.started]
        if start.ended is not None:
            ends.append(start.ended)
        elif after is not None and after.previous_ended is not None:
            ends.append(min(after.previous_ended, after.started))
        steps: dict[str, int] = {}
        for _, stage in mine:
            steps[stage] = steps.get(stage, 0) + 1
        timed.append(TimedStart(start, max(ends), steps))
    return timed


def _start(record: dict[str, Any]) -> Start | None:
    try:
        start = Start(**record)
    except TypeError:
        return None
    numbers = (start.started, start.ranks, start.nodes)
    ends = (start.previous_ended, start.ended)
    texts = [getattr(start, name) for name in _TEXTS]
    for names in (start.versions, start.hosts):
        texts += [*names.keys(), *names.values()] if isinstance(names, dict) else [None]
    is_valid = all(map(is_number, numbers)) and all(x is None or is_number(x) for x in ends)
    return start if is_valid and all(isinstance(text, str) for text in texts) else None


_TEXTS = ("host", "device", "job", "command", "output", "start", "outcome", "reason")


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
    return versions | installed_versions(PACKAGES)


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
