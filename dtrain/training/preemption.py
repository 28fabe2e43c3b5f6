"""Being asked to stop: a signal sets a flag and nothing more; ranks agree at the step's edge."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from dtrain.core.errors import Exit
from dtrain.core.run_dir import RunDir

END_TIME_VARIABLES = ("DTRAIN_END_TIME", "SLURM_JOB_END_TIME")  # seconds since 1970
SPARE_SECONDS = 30.0  # for what follows the save
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """Set by a signal, by a file named `stop` in the run folder, or by the job's end coming near.

    Once set it stays so. Ctrl-C again, a second or more later, ends this process at once.
    """

    def __init__(self, run: Path, *, looks_at_file: bool) -> None:
        self._file = RunDir(run).stop if looks_at_file else None
        self._end = end_time(os.environ)
        self._asked = False
        self._interrupted: float | None = None

    def listen(self) -> None:
        """Catch the signals from now on. More of them than one do no harm."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._catch)

    def is_set(self, step_seconds: float, save_seconds: float) -> bool:
        """Whether this process was asked to stop, or has time for no more than one step and a save.

        Args:
            step_seconds: the longest of the last steps.
            save_seconds: the last save, from its call to the disk.
        """
        if self._end is not None and not self._asked:
            needed = 2 * step_seconds + 2 * save_seconds + SPARE_SECONDS
            self._asked = time.time() + needed > self._end
        return self._asked or (self._file is not None and self._file.exists())

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            # A launcher may pass on what the terminal has sent to this process already.
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > 1:
                os._exit(Exit.INTERRUPTED)  # what is saved stays whole, whatever comes
            self._interrupted = self._interrupted or now

    def forget_file(self) -> None:
        """The file has done its work; the next start shall not stop because of it."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def end_time(environ: Mapping[str, str]) -> float | None:
    """When the job ends, in seconds since 1970, where the batch system says so."""
    for name in END_TIME_VARIABLES:
        if environ.get(name, "").isdigit():
            return float(environ[name])
    return None
