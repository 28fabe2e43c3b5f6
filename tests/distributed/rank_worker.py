"""A rank of a run, without the report: a second of drawing, which other tests look at."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from typing import Any

from dtrain import train
from dtrain.pipeline import runner


def main(arguments: list[str]) -> int:
    """Run the recipe on this rank."""
    runner.write_report = lambda run: None  # type: ignore[assignment]
    if "DIES_AT" in os.environ:
        die_at_rename(os.environ["DIES_AT"], int(os.environ["DIES_AT_RENAME"]))
    return train.main(arguments)


def die_at_rename(target: str, number: int) -> None:
    """Have this process kill itself before its rename `number` to a path with `target` in it."""
    renames = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and target in str(arguments[1]) and next(renames) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
