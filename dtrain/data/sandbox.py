"""Limit the time and memory of untrusted code in this process."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXTRA_BYTES = 1 << 28  # beyond what the process has mapped already
_PAGE = resource.getpagesize()


class LimitExceeded(BaseException):
    """The code exceeded a limit; a BaseException, so that it cannot catch it by accident."""


@contextmanager
def resource_limits(seconds: float) -> Iterator[None]:
    """Run a block within bounds; one that exceeds them raises `LimitExceeded`.

    Args:
        seconds: of CPU time, so that a busy machine does not change what is refused.

    Signals reach only the main thread; in other threads nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise LimitExceeded(f"takes more than {seconds:g} seconds")

    earlier = signal.signal(signal.SIGPROF, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_bound(soft), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except MemoryError as error:
        raise LimitExceeded("asks for too much memory") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, earlier)


def _bound(soft: int) -> int:
    with open("/proc/self/statm", "rb", buffering=0) as file:  # read for each conversation
        mapped = int(file.read(32).split()[0]) * _PAGE
    limit = mapped + EXTRA_BYTES
    return limit if soft == resource.RLIM_INFINITY else min(soft, limit)
