"""Messages and progress of the first rank: plain lines in a file, a progress bar on a terminal.

Messages go through a rich console with soft wrapping. `rich.logging.RichHandler` wraps and pads
lines to the width of the console, 80 columns in a log file, which breaks grep and long paths.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dtrain.core.units import duration

LINE_EVERY_SECONDS = 10.0

# On import bitsandbytes warns on each rank about a kernel that dtrain does not need.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)

console = Console(highlight=False, soft_wrap=True, markup=False)


def is_first_rank() -> bool:
    """Whether this process prints for all ranks (launchers set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a message on the first rank."""
    if is_first_rank():
        console.print(message)
        sys.stdout.flush()


def warn(message: str) -> None:
    """Print a warning on the first rank."""
    say(f"warning: {message}")


class Meter:
    """Progress of a long operation: a bar with an ETA on a terminal, periodic lines in a log."""

    def __init__(self, title: str, total: int, bar: Progress | None, done: int) -> None:
        self.title, self.total, self.done = title, max(total, 1), done
        self._bar, self._start_done, self._started = bar, done, time.monotonic()
        self._last_line = self._started
        self._task: TaskID | None = None
        if bar is not None:
            self._task = bar.add_task(title, total=self.total, completed=done, note="")

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more units as done; `note` is printed next to the progress."""
        self.done += amount
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=amount, note=note)
        elif time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            clock, left = time.strftime("%H:%M:%S"), self._eta()
            say(f"{clock} {self.title}: {self.done}/{self.total}, {left} left  {note}".rstrip())

    def _eta(self) -> str:
        rate = (self.done - self._start_done) / max(time.monotonic() - self._started, 1e-9)
        return duration((self.total - self.done) / rate) if rate else "?"


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Meter]:
    """Show the progress of `total` units, `done` of which are already done (first rank only)."""
    if not (console.is_terminal and is_first_rank()):
        yield Meter(title, total, None, done)
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        yield Meter(title, total, bar, done)
