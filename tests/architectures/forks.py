"""Functions in processes of their own, forked from one that has imported everything.

The caller must not have computed gradients: autograd's threads do not survive a fork.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ports import free_port

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: no fork inherits its pool of threads
CRASHED, TIMED_OUT = 1, -signal.SIGKILL


@dataclass
class Child:
    """A running function.

    Attributes:
        log: what it prints; its result is in the same folder.
    """

    pid: int
    log: Path

    def wait(self, deadline: float) -> int:
        """Its exit status; it is killed at `deadline`, a time of `time.monotonic`."""
        handle = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            os.kill(self.pid, signal.SIGKILL)
        os.close(handle)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def result(self) -> Any:
        """What the function returned."""
        return pickle.loads(self.log.with_suffix(".result").read_bytes())


def start(work: Callable[[], Any], log: Path, environment: dict[str, str] | None = None) -> Child:
    """Run `work` in a forked process; an integer that it returns is the exit status."""
    pid = os.fork()
    if pid:
        return Child(pid, log)
    status = CRASHED
    try:  # a child never returns to the caller
        os.environ.update(environment or {})
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        result = work()
        log.with_suffix(".result").write_bytes(pickle.dumps(result))
        status = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def call(work: Callable[[], Any], log: Path, seconds: float) -> Any:
    """The result of `work`, computed in a forked process.

    Raises:
        RuntimeError: it failed; with the last line of what it printed.
    """
    child = start(work, log)
    status = child.wait(time.monotonic() + seconds)
    if status == TIMED_OUT:
        raise RuntimeError(f"no end after {seconds:.0f} s")
    if status:
        raise RuntimeError(last_line(log))
    return child.result()


def start_ranks(work: Callable[[], int], ranks: int, log: Path) -> list[Child]:
    """Run `work` as each of some ranks, which find each other as under a launcher."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(
            work, log.with_suffix(f".{rank}"), common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(ranks)
    ]


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no word"


def first_to_end(children: list[Child]) -> int:
    """The place of a child that has ended."""
    poll = select.poll()
    handles = [os.pidfd_open(child.pid) for child in children]
    for handle in handles:
        poll.register(handle, select.POLLIN)
    ended = poll.poll()[0][0]
    for handle in handles:
        os.close(handle)
    return handles.index(ended)
