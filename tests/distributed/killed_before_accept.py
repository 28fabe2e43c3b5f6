"""A rank that is killed when everything was checked and nothing of the run has changed yet."""

from __future__ import annotations

import os
import signal

from dtrain import train
from dtrain.pipeline import runner


def main(arguments: list[str]) -> int:
    """Run the recipe on this rank until its start would be accepted."""
    runner.accept = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    return train.main(arguments)
