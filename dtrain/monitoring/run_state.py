"""What a run is doing now, from the files of its folder alone, on any machine that sees them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import read_tail
from dtrain.core.locks import FolderLock
from dtrain.core.output import printable
from dtrain.core.run_dir import EVALUATION, STARTS, RunDir, read_exit_report
from dtrain.core.stage_dir import METRICS, STAGE_RECORD
from dtrain.launching.status import log_of
from dtrain.monitoring.alerts import WINDOW, find_alerts
from dtrain.monitoring.metrics import is_number
from dtrain.monitoring.run_record import RunRecord, read_run

SILENT_SECONDS = 900.0  # longer than a save or an evaluation of most runs
LOG_TAIL_BYTES = 4096
LOG_LINES = 5


@dataclass(frozen=True)
class StageState:
    """A stage.

    Attributes:
        state: waiting, running or complete.
        step, total_steps: finished, and of the whole stage; None before its first step.
        seconds_left: until its last step, at the speed of the newest steps; None if unknown.
        losses: training loss of each step in the file.
        held_out: the newest held-out losses, by set.
        alerts: one line each.
    """

    name: str
    state: str
    step: int = 0
    total_steps: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    held_out: dict[str, float] = field(default_factory=dict)
    alerts: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunState:
    """A run.

    Attributes:
        state: starting, running, silent, finished, failed, interrupted or not started.
        reason: why it failed, or why its last start was refused.
        seconds_since_change: age of its newest file.
        seconds_left: until the last step of the last stage, evaluations and merges not counted;
            None if it is not running, or the length of a later stage is unknown.
        log: the newest lines of its job's log; empty for a run without one.
    """

    name: str
    folder: str
    state: str
    reason: str
    seconds_since_change: float | None
    seconds_left: float | None
    stages: list[StageState]
    log: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the losses of all steps are in metrics.jsonl and are left out."""
        value = asdict(self)
        for stage in value["stages"]:
            del stage["losses"]
        return value


def read_state(folder: Path) -> RunState:
    """Read what a run is doing.

    Raises:
        UserError: it is not a run folder.
    """
    run = RunDir(folder)
    run.check_exists()
    record = read_run(folder)
    stages = [_stage(record, run, settings) for settings in record.stages]
    age = _seconds_since_change(run)
    state, reason = _state(run, stages, age)
    is_running = state == "running"
    return RunState(
        name=record.name,
        folder=str(folder),
        state=state,
        reason=reason,
        seconds_since_change=age,
        seconds_left=_chain_seconds(record, stages) if is_running else None,
        stages=stages,
        log=list(_log_lines(run)),
    )


def _state(run: RunDir, stages: list[StageState], age: float | None) -> tuple[str, str]:
    """One word for the run, and why it failed or why its last start was refused."""
    try:
        report, refusal = read_exit_report(run.exit_report), read_exit_report(run.refused)
    except UserError as error:
        report, refusal = {"outcome": "failed", "reason": str(error)}, {}
    if run.requested.exists() and not refusal and FolderLock(run.path).is_held():
        return "starting", ""
    reason = f"the last start was refused: {refusal.get('reason', '')}" if refusal else ""
    if outcome := report.get("outcome"):
        return str(outcome), reason or str(report.get("reason", ""))
    if not any(stage.step for stage in stages):
        return ("not started" if age is None else "running"), ""
    return ("silent" if age is not None and age > SILENT_SECONDS else "running"), ""


def _stage(record: RunRecord, run: RunDir, settings: dict[str, Any]) -> StageState:
    name = str(settings["name"])
    lines = record.metrics.get(name, [])
    steps = [line for line in lines if _number(line.get("tokens_per_second")) is not None]
    if not steps:
        return StageState(name, "complete" if name in record.artifacts else "waiting")
    last = steps[-1]
    total = last.get("total_steps") if isinstance(last.get("total_steps"), int) else None
    done = name in record.artifacts
    left = None if done or total is None else (total - last["step"]) * _step_seconds(steps)
    held_out = [line["held_out"] for line in lines if isinstance(line.get("held_out"), dict)]
    return StageState(
        name=name,
        state="complete" if done else "running",
        step=last["step"],
        total_steps=total,
        seconds_left=left,
        loss=_number(last.get("loss")),
        learning_rate=_number(last.get("learning_rate")),
        grad_norm=_number(last.get("grad_norm")),
        tokens_per_second=_number(last.get("tokens_per_second")),
        peak_memory_bytes=_number(last.get("peak_memory_bytes")),
        held_out={
            str(key): value
            for key, loss in (held_out[-1].items() if held_out else ())
            if (value := _number(loss)) is not None
        },
        alerts=[str(alert) for alert in find_alerts(lines)],
        losses=[x for line in steps if (x := _number(line.get("loss"))) is not None],
    )


def _step_seconds(steps: list[dict[str, Any]]) -> float:
    """Median duration of the newest steps."""
    totals = []
    for line in steps[-WINDOW:]:
        seconds = line.get("seconds")
        if isinstance(seconds, dict):
            totals.append(sum(_number(value) or 0.0 for value in seconds.values()))
    return median(totals) if totals else 0.0


def _chain_seconds(record: RunRecord, stages: list[StageState]) -> float | None:
    """Time until the end of the last stage, from the speed of the stage that is running."""
    running = [stage for stage in stages if stage.state == "running"]
    if not running or running[-1].seconds_left is None:
        return None
    total, speed = running[-1].seconds_left, running[-1].tokens_per_second
    for stage, settings in zip(stages, record.stages, strict=True):
        if stage.state != "waiting":
            continue
        train, data = settings.get("train") or {}, settings.get("data") or {}
        sizes = [train.get("steps"), train.get("global_batch_size"), data.get("sequence_length")]
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) < len(sizes) or not speed:
            return None
        total += numbers[0] * numbers[1] * numbers[2] / speed
    return total


def _seconds_since_change(run: RunDir) -> float | None:
    """Age of the newest file that the ranks write while they work; None without one."""
    times = []
    for pattern in (f"*/{METRICS}", f"*/{STAGE_RECORD}", EVALUATION, STARTS):
        for path in run.path.glob(pattern):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None


def _log_lines(run: RunDir) -> Iterator[str]:
    """The newest lines of the job's log, without control characters."""
    log = None
    with suppress(UserError):  # a damaged list of starts
        log = log_of(run.path)
    if log is None:
        return
    lines = [line for line in read_tail(log, LOG_TAIL_BYTES).split("\n") if line.strip()]
    yield from map(printable, lines[-LOG_LINES:])


def _number(value: object) -> float | None:
    """A finite number, or None."""
    return float(value) if is_number(value) else None
