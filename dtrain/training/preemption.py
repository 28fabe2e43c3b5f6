"""Requests to stop: a signal only sets a flag, and the ranks agree on it at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from dtrain.core.errors import Exit
from dtrain.core.interrupts import catch_stop_signals
from dtrain.core.run_dir import RunDir

END_TIME_VARIABLES = ("DTRAIN_END_TIME", "SLURM_JOB_END_TIME")  # seconds since 1970
SPARE_SECONDS = 30.0  # for the work after the save


class StopFlag:
    """Set by a signal, by a file named `stop` in the run folder, or shortly before the job ends.

    Once set it stays set. A second Ctrl-C, at least a second later, ends this process at once.

    Args:
        run: the run folder.
        check_file: whether this rank checks for the file.
    """

    def __init__(self, run: Path, *, check_file: bool) -> None:
        self._file = RunDir(run).stop if check_file else None
        self._end = end_time(os.environ)
        self._asked = False
        self._interrupted: float | None = None

    def listen(self) -> None:
        """Install the signal handlers. Repeated signals do no harm."""
        catch_stop_signals(self._catch)

    def is_set(self, step_seconds: float, save_seconds: float) -> bool:
        """Whether this process was asked to stop, or has no time for more than a step and a save.

        Args:
            step_seconds: duration of the longest recent step.
            save_seconds: duration of the last save, from its call until it was on disk.
        """
        if self._end is not None and not self._asked:
            needed = 2 * step_seconds + 2 * save_seconds + SPARE_SECONDS
            self._asked = time.time() + needed > self._end
        return self._asked or (self._file is not None and self._file.exists())

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            # A launcher may forward a signal that the terminal has sent to this process already.
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > 1:
                os._exit(Exit.INTERRUPTED)  # complete checkpoints are not affected
            self._interrupted = self._interrupted or now

    def forget_file(self) -> None:
        """Remove the file, so that it does not stop the next start."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def end_time(environ: Mapping[str, str]) -> float | None:
    """End of the job in seconds since 1970; None if the batch system does not give it."""
    for name in END_TIME_VARIABLES:
        if environ.get(name, "").isdigit():
            return float(environ[name])
    return None
