"""outcome.json: how a start ended, for the job's supervisor and for the other ranks.

A rank that fails breaks the connections of the others, whose errors are then noise. So it writes
its exit report first, and the others exit with its status and print nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.core.errors import Exit
from dtrain.core.files import write_json
from dtrain.core.log import is_first_rank, say
from dtrain.core.run_dir import RunDir

OUTCOMES = {Exit.FINISHED: "finished", Exit.INTERRUPTED: "interrupted"}
WAIT_SECONDS = 2.0
POLL_SECONDS = 0.05
WRITE_TRIES = 5


class ExitReport:
    """The exit report of one rank; nothing is written until `open`, as another run may own it."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._started = time.time()
        self._lock = threading.Lock()  # the hang watchdog's thread reports too

    def open(self, run: RunDir) -> None:
        """Write to this run folder; the first rank removes the report of the last start."""
        self.path = run.exit_report
        if is_first_rank():
            self.path.unlink(missing_ok=True)

    def end(self, status: Exit, reason: str = "") -> int:
        """Report an end that is no failure; return the exit status."""
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
        if self.path is None and os.environ.get("LOCAL_RANK", "0") != "0":
            return int(status)  # a wrong recipe is reported once on each machine
        has_crashed = status == Exit.CRASHED
        with self._lock:
            if has_crashed or not is_first_rank():
                first = self._await_failure(0 if has_crashed else WAIT_SECONDS)
                if first is not None:
                    return first
            print(text, file=sys.stderr, flush=True)
            self._write(status, (reason or text).removeprefix("error: "))
            say(f"ended with status {int(status)}")
        return int(status)

    def failure_elsewhere(self) -> tuple[int, int] | None:
        """Rank and exit status of the first failure of this start; None if there is none."""
        report = self._read_failure()
        return None if report is None else (int(report.get("rank", 0)), int(report["status"]))

    def _await_failure(self, seconds: float) -> int | None:
        """The status that another rank reports within so many seconds."""
        deadline = time.monotonic() + seconds
        while (report := self._read_failure()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return None if report is None else int(report["status"])

    def _read_failure(self) -> dict[str, Any] | None:
        """The failure that another rank reported; the report of an earlier start is ignored."""
        with suppress(OSError, ValueError, AttributeError, KeyError):
            if self.path.stat().st_mtime < self._started:  # type: ignore[union-attr]
                return None
            report: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))  # type: ignore[union-attr]
            return None if int(report["status"]) in OUTCOMES else report
        return None

    def _write(self, status: Exit, reason: str) -> None:
        if self.path is None:
            return
        outcome = OUTCOMES.get(status, "failed")
        report = {"outcome": outcome, "status": int(status), "reason": reason.strip()}
        if outcome == "failed":
            report["rank"] = int(os.environ.get("RANK", "0"))
        for _ in range(WRITE_TRIES):  # other ranks write too, and the disk may be full for a moment
            with suppress(OSError):
                write_json(self.path, report)
                return
            time.sleep(POLL_SECONDS)
