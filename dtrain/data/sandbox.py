"""A bound on the time and memory that a piece of foreign code takes in this process."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXTRA_BYTES = 1 << 28  # beyond what the process maps already
_PAGE = resource.getpagesize()


class LimitExceeded(BaseException):
    """The code took too long, or too much; foreign code that catches exceptions misses it."""


@contextmanager
def resource_limits(seconds: float) -> Iterator[None]:
    """Run a block within bounds; one that exceeds them raises `LimitExceeded`.

    Seconds of work, not of the clock: a busy machine must not change what is refused.

    Python's own code can be stopped between two steps, and a request for memory can be refused;
    a signal reaches the main thread only, so in another thread the time is not bounded.
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
    with open("/proc/self/statm", "rb", buffering=0) as file:  # for each conversation: be quick
        mapped = int(file.read(32).split()[0]) * _PAGE
    wanted = mapped + EXTRA_BYTES
    return wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
