"""outcome.json: how a start ended, for a job script; and among the ranks, who failed first.

A rank that fails takes the others' connections down with it, and what they say then is noise. So
it leaves its word here before it lets go of them, and they end with its status, in silence.
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

WORDS = {Exit.FINISHED: "finished", Exit.INTERRUPTED: "stopped-to-go-on"}
PATIENCE_SECONDS = 2.0
POLL_SECONDS = 0.05
WRITE_TRIES = 5


class ExitReport:
    """One rank's part in it; silent until `open`, since the folder may be another run's."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._since = time.time()
        self._lock = threading.Lock()  # the watching thread reports too

    def open(self, run: RunDir) -> None:
        """This start owns the folder `run`; the first rank forgets how the last one ended."""
        self.path = run.exit_report
        if is_first_rank():
            self.path.unlink(missing_ok=True)

    def end(self, status: Exit, reason: str = "") -> int:
        """All went as it should; the first rank writes so."""
        if is_first_rank():
            self._write(status, reason)
        return int(status)

    def fail(self, status: Exit, text: str, reason: str = "") -> int:
        """Tell of a failure, unless it follows from another rank's; return the exit status.

        All ranks meet the same error at the same time as a rule: then the first one tells it.

        Args:
            text: for the terminal.
            reason: for the file; the text if not given.
        """
        speaks = is_first_rank() and status != Exit.CRASHED
        waits = not is_first_rank() and status != Exit.CRASHED
        if self.path is None and os.environ.get("LOCAL_RANK", "0") != "0":
            return int(status)  # a wrong recipe is told once a machine
        with self._lock:
            if (
                not speaks
                and (other := self._other_status(PATIENCE_SECONDS if waits else 0)) is not None
            ):
                return other
            print(text, file=sys.stderr, flush=True)
            self._write(status, (reason or text).removeprefix("error: "))
            say(f"ended with status {int(status)}")
        return int(status)

    def failure_elsewhere(self) -> tuple[int, int] | None:
        """Rank and exit status of the first failure of this start; None while there is none."""
        known = self._read()
        return None if known is None else (int(known.get("rank", 0)), int(known["status"]))

    def _other_status(self, patience_seconds: float) -> int | None:
        """The status that another rank has failed with."""
        deadline = time.monotonic() + patience_seconds
        while (known := self._read()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return None if known is None else int(known["status"])

    def _read(self) -> dict[str, Any] | None:
        """What another rank failed with; the word of an earlier start is not believed."""
        with suppress(OSError, ValueError, AttributeError, KeyError):
            if self.path.stat().st_mtime < self._since:  # type: ignore[union-attr]
                return None
            known: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))  # type: ignore[union-attr]
            return None if int(known["status"]) in WORDS else known
        return None

    def _write(self, status: Exit, reason: str) -> None:
        if self.path is None:
            return
        word = WORDS.get(status, "failed")
        content = {"outcome": word, "status": int(status), "reason": reason.strip()}
        if word == "failed":
            content["rank"] = int(os.environ.get("RANK", "0"))
        for _ in range(WRITE_TRIES):  # other ranks write, too, where a disk is full
            with suppress(OSError):
                write_json(self.path, content)
                return
            time.sleep(POLL_SECONDS)
