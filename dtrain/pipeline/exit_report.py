"""How a start ended, for the supervisor and the other ranks.

A rank that fails breaks the connections of the others, whose errors are then noise. So it writes
its exit report first, and the others exit with its status and print nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_json
from dtrain.core.log import is_first_rank, say
from dtrain.core.output import wrapped
from dtrain.core.run_dir import FolderIdentity, RunDir, read_exit_report
from dtrain.monitoring.starts import record_end, start_id

OUTCOMES = {Exit.FINISHED: "finished", Exit.INTERRUPTED: "interrupted"}
WAIT_SECONDS = 10.0  # the first rank closes its callbacks before it writes its report
# torchrun stops a rank that hangs ten seconds after another one died.
WAITS = {Exit.CRASHED: 0.0, Exit.HANG: 2.0}
POLL_SECONDS = 0.05
WRITE_TRIES = 5


class ExitReport:
    """The exit report of one rank; before `open` nothing is written: another run may own it."""

    def __init__(self) -> None:
        self._run: RunDir | None = None
        self._identity: FolderIdentity | None = None
        self._start = start_id(os.environ)
        self._lock = threading.Lock()  # the hang watchdog's thread also reports

    def open(self, run: RunDir) -> None:
        """Set the run folder."""
        self._run = run

    def watch_folder(self) -> None:
        """Remember which folder the run folder is, once the first rank has created it."""
        assert self._run is not None
        self._identity = FolderIdentity(self._run.path)

    def moved_folder(self) -> UserError | None:
        """The error if the run folder was moved or deleted; None if it is in its place."""
        try:
            if self._identity is not None:
                self._identity.check()
        except UserError as error:
            return error
        return None

    def end(self, status: Exit, reason: str = "") -> int:
        """Report an end without failure; return the exit status."""
        if is_first_rank():
            self._write(status, reason)
        return int(status)

    def fail(self, status: Exit, text: str, reason: str = "") -> int:
        """Report a failure, unless another rank's failure caused it; return the exit status.

        All ranks usually meet the same error at the same time; then the first rank reports it.

        Args:
            status: exit status of this rank.
            text: for the terminal.
            reason: for the file; by default the text.
        """
        cannot_tell = self._run is None or self.moved_folder() is not None
        if cannot_tell and os.environ.get("LOCAL_RANK", "0") != "0":
            return int(status)  # each machine prints it once
        with self._lock:
            if status == Exit.CRASHED or not is_first_rank():
                first = self._await_failure(WAITS.get(status, WAIT_SECONDS))
                if first is not None:
                    return first
            self._write(status, (reason or text).removeprefix("error: "))
            print(wrapped(text, sys.stderr), file=sys.stderr, flush=True)
            say(f"ended with status {int(status)}")
        return int(status)

    def failure_elsewhere(self) -> tuple[int, int] | None:
        """Rank and exit status of the first failure of this start; None if there is none."""
        report = self._read_failure()
        return None if report is None else (int(report.get("rank", 0)), int(report["status"]))

    def _await_failure(self, seconds: float) -> int | None:
        """The status that another rank reports within `seconds`, or None."""
        deadline = time.monotonic() + seconds
        while (report := self._read_failure()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return None if report is None else int(report["status"])

    def _read_failure(self) -> dict[str, Any] | None:
        """The failure that another rank reported; the report of an earlier start is ignored."""
        if self._run is None:
            return None
        for path in (self._run.refused, self._run.exit_report):
            with suppress(UserError, OSError, ValueError, KeyError):
                report = read_exit_report(path)
                is_failure = bool(report) and int(report["status"]) not in OUTCOMES
                if is_failure and report["start"] == self._start:
                    return report
        return None

    def _write(self, status: Exit, reason: str) -> None:
        if self._run is None or self.moved_folder() is not None:
            return
        outcome = OUTCOMES.get(status, "failed")
        report = {"outcome": outcome, "status": int(status), "reason": reason.strip()}
        report["start"] = self._start
        if outcome == "failed":
            report["rank"] = int(os.environ.get("RANK", "0"))
        for _ in range(WRITE_TRIES):  # other ranks write too, and the disk may be full for a moment
            with suppress(OSError):
                path = self._run.start_exit_report
                write_json(path, report)
                if path == self._run.exit_report and status != Exit.FINISHED:  # not refused
                    record_end(self._run, self._start, outcome, reason)
                return
            time.sleep(POLL_SECONDS)
