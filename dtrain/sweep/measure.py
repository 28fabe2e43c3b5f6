"""The loss that a sweep minimizes, read from the files of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dtrain.config.sweep import TRAINING
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import read_json
from dtrain.core.output import printable
from dtrain.core.run_dir import RunDir
from dtrain.core.stage_dir import METRICS
from dtrain.monitoring.metrics import read_metrics
from dtrain.monitoring.run_files import EvaluationFile
from dtrain.monitoring.starts import read_starts, timed_starts
from dtrain.sweep.record import Point

WINDOWS = 10  # of a stage, whose mean training losses count as evaluations
CAUSES = {
    Exit.NON_FINITE: "diverged",
    Exit.OUT_OF_MEMORY: "out of memory",
    Exit.HANG: "hang",
    Exit.GATE_FAILED: "gate",
    Exit.CRASHED: "crashed",
}


@dataclass(frozen=True)
class Target:
    """The loss that is minimized: of a stage, on an evaluation set or in training."""

    stage: str
    evaluate_on: str

    def points(self, run: RunDir) -> list[Point]:
        """The losses of a run during the stage, as far as it has come."""
        lines = read_metrics(run.stage(self.stage).metrics)
        if self.evaluate_on == TRAINING:
            return list(_window_losses(lines))[: WINDOWS - 1]
        return [
            (line["step"], line["held_out"].get(self.evaluate_on))
            for line in lines
            if isinstance(line.get("held_out"), dict)
        ]

    def value(self, run: RunDir) -> float | None:
        """The loss of a finished run; None if it is not finite."""
        if self.evaluate_on == TRAINING:
            windows = list(_window_losses(read_metrics(run.stage(self.stage).metrics)))
            return windows[-1][1] if windows else None
        losses = read_json(run.evaluation, EvaluationFile).get("losses") or {}
        value = (losses.get(self.evaluate_on) or {}).get(self.stage)
        return float(value) if isinstance(value, int | float) else None


def _window_losses(lines: list[dict[str, Any]]) -> Iterator[Point]:
    """(last step, mean loss over its targets) of each tenth of a stage that is finished."""
    steps = {line["step"]: line for line in lines if isinstance(line.get("total_steps"), int)}
    if not steps:
        return
    total = steps[max(steps)]["total_steps"]
    ends = sorted({total * i // WINDOWS for i in range(WINDOWS + 1)})
    for start, end in pairwise(ends):
        if end not in steps:
            return
        window = [steps[step] for step in range(start + 1, end + 1) if step in steps]
        yield end, _mean_loss(window)


def _mean_loss(window: list[dict[str, Any]]) -> float | None:
    losses = [line["loss"] for line in window if isinstance(line.get("loss"), int | float)]
    targets = [int(line.get("supervised_tokens") or 0) for line in window]
    if len(losses) < len(window) or not any(targets):
        return None
    return sum(a * b for a, b in zip(losses, targets, strict=True)) / sum(targets)


def ending(run: RunDir, log_tail: str = "", status: int | None = None) -> tuple[str, int, str]:
    """How a run's last start has ended.

    Args:
        log_tail: the end of what it printed.
        status: exit status of its process, if that is known.

    Returns:
        finished, interrupted or failed; the exit status; the reason in one line.
    """
    try:
        report = run.read_exit_report()
    except UserError as error:
        report = {"outcome": "failed", "status": Exit.USER_ERROR, "reason": str(error)}
    outcome, status = report.get("outcome"), report.get("status", status)
    code = Exit.CRASHED if status is None else int(status)
    if outcome in ("finished", "interrupted"):
        return str(outcome), code, ""
    if outcome is None and code in (Exit.INTERRUPTED, Exit.CTRL_C):
        return "interrupted", code, ""
    reason = str(report.get("reason") or "") or _last_error(log_tail)
    if not reason:
        reason = f"ended with status {code}" if status is not None else "ended without a report"
    lines = [line.strip() for line in reason.split("\n") if line.strip()]
    line = lines[0] if not lines[0].startswith("Traceback") else lines[-1]
    cause = next((text for known, text in CAUSES.items() if known == code), "")
    prefix = "" if not cause or line.startswith(cause) else f"{cause}: "
    return "failed", code, printable(prefix + line)


def _last_error(log: str) -> str:
    errors = [line for line in log.split("\n") if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else ""


def spent(run: RunDir) -> tuple[float, float]:
    """Seconds and GPU-hours of all starts of a run."""
    metrics = {path.parent.name: read_metrics(path) for path in run.path.glob(f"*/{METRICS}")}
    starts = timed_starts(read_starts(run), metrics)
    hours = sum(timed.seconds * timed.start.gpus for timed in starts) / 3600
    return sum(timed.seconds for timed in starts), hours
