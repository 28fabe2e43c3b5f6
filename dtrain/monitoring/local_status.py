"""Runs of this machine, for `dtrain status`, `logs` and `cancel`: no batch system knows them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.core.errors import UserError
from dtrain.core.files import write_atomic
from dtrain.core.locks import FolderLock
from dtrain.core.run_dir import RunDir
from dtrain.core.units import duration, local_time
from dtrain.monitoring.run_state import StageState, read_state
from dtrain.monitoring.starts import LOST, Start, read_starts

POLL_SECONDS = 1.0
RESUMABLE = {"interrupted", "failed", LOST}


def local_status(folder: Path) -> list[str]:
    """Describe a run: what it is doing or how it ended, its stages, and each attempt.

    Raises:
        UserError: it is not a run folder.
    """
    run, state = RunDir(folder), read_state(folder)
    starts = read_starts(run)
    lock = FolderLock(folder)
    if lock.is_held():
        word = "starting" if state.state == "starting" else "running"
        lines = [f"{word}: {lock.holder()}"]
    else:
        outcome = state.state if state.state in ("finished", "failed", "interrupted") else LOST
        lines = [_ended_line(outcome if starts else "not started", starts)]
    if state.reason and state.reason not in lines[0]:
        lines.append(f"    {state.reason}")
    lines += [_stage_line(stage, is_running=lock.is_held()) for stage in state.stages]
    lines += [_attempt_line(number, start) for number, start in enumerate(starts, start=1)]
    return lines


def _ended_line(outcome: str, starts: list[Start]) -> str:
    """How the last attempt ended, and how to go on."""
    if not starts:
        return "no attempt has trained yet"
    word = "ended without a report (killed, or its machine went down)"
    line = word if outcome == LOST else outcome
    command = starts[-1].command
    return f"{line}; the same command resumes: {command}" if outcome in RESUMABLE else line


def _stage_line(stage: StageState, *, is_running: bool) -> str:
    if not stage.step:
        return f"stage {stage.name}: {stage.state}"
    line = f"stage {stage.name}: step {stage.step} of {stage.total_steps or '?'}"
    if stage.state == "complete":
        return f"{line}, complete"
    left = stage.seconds_left if is_running else None
    parts = [line, "" if left is None else f"{duration(left)} left"]
    parts.append("" if stage.loss is None else f"loss {stage.loss:.4f}")
    return ", ".join(part for part in parts if part)


def _attempt_line(number: int, start: Start) -> str:
    began = local_time(start.started)
    head = f"attempt {number}  {began}  {start.host}  {start.ranks} x {start.device}"
    if start.ended is None:
        return f"{head}  no end recorded"
    reason = f": {start.reason}" if start.outcome == "failed" and start.reason else ""
    return f"{head}  {duration(max(0.0, start.ended - start.started))}: {start.outcome}{reason}"


def local_log(folder: Path) -> Path:
    """The file that a run prints to.

    Raises:
        UserError: it is not a run folder, or it does not print to a file.
    """
    run = RunDir(folder)
    run.check_exists()
    starts = read_starts(run)
    output = starts[-1].output if starts else ""
    if output and Path(output).is_file():
        return Path(output)
    destination = f"to the terminal {output}" if output.startswith("/dev/") else "into a pipe"
    if output and not output.startswith("/dev/"):
        destination = f"to {output}, which is gone"
    if not starts:
        destination = "nothing yet that is kept"
    raise UserError(
        f"there is no log: the run printed {destination}",
        where=str(folder),
        fix="dtrain status and dtrain watch read its files; this keeps its output: "
        "dtrain run … 2>&1 | tee run.log",
    )


def follow_local(folder: Path, *, until_over: bool) -> Iterator[str]:
    """Yield a run's log, and with `until_over` what is added until no process works on the run.

    Raises:
        UserError: see `local_log`.
    """
    log, lock = local_log(folder), FolderLock(folder)
    with open(log, encoding="utf-8", errors="replace") as file:
        is_over = False
        while not is_over:
            is_over = not until_over or not lock.is_held()
            yield file.read()
            if not is_over:
                time.sleep(POLL_SECONDS)


def stop_local(folder: Path) -> str:
    """Ask the processes of a run to save and stop; return what was done.

    Raises:
        UserError: it is not a run folder.
    """
    run, lock = RunDir(folder), FolderLock(folder)
    run.check_exists()
    over = "no job or process of this run is waiting or running"
    process, holder = lock.holder_here(), lock.holder()
    if process is not None:
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:  # it has just ended
            return over
    elif lock.is_held():  # of another machine, or of a user whose processes are hidden
        write_atomic(run.stop, "")
    else:
        return over
    return f"{holder} was asked to save and stop; dtrain status {folder} shows the end"
