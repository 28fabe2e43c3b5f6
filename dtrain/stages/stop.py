"""Being asked to stop: a signal sets a flag and nothing more; ranks agree at the step's edge."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """Set by a signal or by a file named `stop` in the run folder; never unset."""

    def __init__(self, run: Path) -> None:
        self._file = run / "stop"
        self._asked = False

    def listen(self) -> None:
        """Catch the signals from now on. More of them than one do no harm."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._catch)

    def is_set(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked or self._file.exists()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
