"""Messages and progress of the first rank: plain lines in a file, a progress bar on a terminal.

Messages go through a rich console with soft wrapping. `rich.logging.RichHandler` wraps and pads
lines to the width of the console, 80 columns in a log file, which breaks grep and long paths.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from dtrain.core.output import visible, wrapped
from dtrain.core.units import duration

LINE_EVERY_SECONDS = 10.0

# On import bitsandbytes warns on each rank about a kernel that dtrain does not need.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)

# rich alone leaves bold and underlined text where NO_COLOR is set (no-color.org).
_COLORS: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"


class SafeConsole(Console):
    """A console that makes visible what would steer the terminal in other people's text."""

    @property
    def file(self) -> Any:
        """What it writes to, past the streams that change text."""
        file = super().file
        return getattr(file, "rich_proxied_file", file)  # below the proxy of a live display

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """The segments of a renderable; only rich's own control codes stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


console = SafeConsole(highlight=False, soft_wrap=True, markup=False, color_system=_COLORS)


def is_first_rank() -> bool:
    """Whether this process prints for all ranks (launchers set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a message on the first rank, with the time of day if it is a line of a run's log."""
    is_log_line = "RANK" in os.environ and not console.is_terminal and "\n" not in message
    _print(_with_time(message) if is_log_line else message)


def _print(text: str) -> None:
    if is_first_rank():
        console.print(wrapped(text, sys.stdout))
        sys.stdout.flush()


def _with_time(line: str) -> str:
    return f"{time.strftime('%H:%M:%S')} {line}"


def warn(message: str) -> None:
    """Print a warning on the first rank."""
    say(f"warning: {message}")


class Meter:
    """Progress of a long operation: a bar and the time left on a terminal, some lines in a log.

    Several threads may advance it.

    Args:
        scope: what the time left is that of, such as " in this stage".
        after: units of work, of the same size, of the later stages.
    """

    def __init__(
        self, title: str, total: int, bar: Bars | None, done: int, scope: str = "", after: float = 0
    ) -> None:
        self.title, self.total, self.done = title, max(total, 1), done
        self.scope, self.after = scope, after
        self._bar, self._start_done, self._started = bar, done, time.monotonic()
        self._last_line = self._started
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        if bar is not None:
            self._task = bar.add_task(title, total=self.total, completed=done, left="", details="")

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more units as done; `note` is printed next to the progress."""
        with self._lock:
            self.done += amount
            if self._bar is not None and self._task is not None:
                left = self.time_left()
                details = "\n".join(filter(None, (left if self.scope else "", note)))
                left = "" if self.scope else left
                self._bar.update(self._task, advance=amount, left=left, details=details)
            elif time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
                self._last_line = time.monotonic()
                line = f"{self.title}: {self.done}/{self.total}, {self.time_left()}  {note}"
                _print(_with_time(line.rstrip()))

    def time_left(self) -> str:
        """The time left of this operation, and of what follows it."""
        rate = (self.done - self._start_done) / max(time.monotonic() - self._started, 1e-9)
        left = self.total - self.done
        text = f"{duration(left / rate) if rate else '?'} left{self.scope}"
        if self.after and rate:
            text += f", about {duration((left + self.after) / rate)} in all stages"
        return text


class Bars(Progress):
    """Bars with details below them, which a line of 80 columns has no room for."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars, and the details of each."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["details"]:
                yield Text(task.fields["details"])


@contextmanager
def progress(
    title: str, total: int, done: int = 0, scope: str = "", after: float = 0
) -> Iterator[Meter]:
    """Show the progress of `total` units, `done` of which are already done (first rank only).

    Args:
        scope, after: as of a Meter.
    """
    if not (console.is_terminal and is_first_rank()):
        yield Meter(title, total, None, done, scope, after)
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(overflow="fold")),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[left]}"),
    )
    with Bars(*columns, console=console, transient=False) as bars:
        yield Meter(title, total, bars, done, scope, after)
