"""Ctrl-C while a program starts, and the signals that stop a run.

It imports next to nothing, so that it can come first.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from dtrain.core.errors import Exit

INTERRUPTED_EARLY = "interrupted before the training; the same command starts it again"
# At which a run saves and stops; a launcher passes them on to its ranks.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def catch_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call `handler` at each of STOP_SIGNALS from now on."""
    for number in STOP_SIGNALS:
        # nohup ignores SIGHUP on purpose; a shell's background job ignores SIGINT by accident
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_on_interrupt(message: str = "") -> None:
    """From now on Ctrl-C ends this process at once, with `message` in place of a traceback."""

    def end(number: int, frame: FrameType | None) -> None:
        if message:
            say_in_handler(message)
        os._exit(Exit.CTRL_C)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)


def say_in_handler(message: str) -> None:
    """Print a line on stderr from a signal handler, which may have interrupted a print."""
    with suppress(OSError):  # the terminal is gone
        os.write(2, f"{message}\n".encode())


def hold_interrupts() -> None:
    """Let Ctrl-C wait until the program that this process becomes asks for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def release_interrupts() -> None:
    """Deliver what `hold_interrupts` held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
