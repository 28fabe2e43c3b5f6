"""Run the same work in several forked processes, and end processes on purpose."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, NoReturn

from dtrain.core.errors import Exit, UserError
from dtrain.core.log import warn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_SECONDS = 0.2

ProgressCallback = Callable[[int], None]  # called with the units of work done since the last call
Work = Callable[[int, ProgressCallback], None]


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_at_once(status: int) -> NoReturn:
    """Flush stdout and stderr, and end this process without destructors and exit handlers."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader may be gone
            stream.flush()
    os._exit(status)


def output_file(descriptor: int) -> str:
    """The file that this process prints to, or its terminal; empty if it is neither."""
    try:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
    is_device = path.startswith("/dev/") and not os.isatty(descriptor)
    return path if path.startswith("/") and not is_device else ""


class WorkerPool:
    """Processes that do the same work; see `worker_pool`."""

    def __init__(self, count: int, work: Work) -> None:
        context = multiprocessing.get_context("fork")
        # A slot for each process: a lock would be lost with its holder.
        self._progress = context.RawArray("q", count)
        self._workers: dict[int, tuple[ForkProcess, Connection]] = {}
        for index in range(count):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (work, index, self._progress, sender, os.getpid())
            process = context.Process(target=_run_worker, args=arguments, daemon=True)
            with _without_tokenizer_threads():
                process.start()
            sender.close()
            self._workers[process.sentinel] = process, receiver

    def join(self, advance: ProgressCallback) -> None:
        """Wait for all processes.

        Args:
            advance: called with the progress of all of them together.

        Raises:
            UserError: the first that one of them raised.
            RuntimeError: one of them crashed.
        """
        done, alive = 0, list(self._workers.values())
        while alive:
            ended = wait([item for pair in alive for item in _waitable(*pair)], POLL_SECONDS)
            advance((total := sum(self._progress)) - done)
            done = total
            for process, receiver in list(alive):
                if process.sentinel in ended or receiver in ended:
                    _check_ended(process, receiver)
                    alive.remove((process, receiver))

    def kill(self) -> None:
        """Kill the processes that still run."""
        for process, _ in self._workers.values():
            process.kill()
            process.join()


@contextmanager
def worker_pool(count: int, work: Work) -> Iterator[WorkerPool]:
    """Run `work(index, advance)` for index 0 … count - 1, each in its own process.

    The processes are forked, so they start at once and need no copy of their inputs, but `work`
    must touch no thread, GPU or connection of this process. A killed process raises a warning only,
    so the caller checks whether all work is done.

    Args:
        count: of processes.
        work: calls `advance(units)` for the work it has done.
    """
    pool = WorkerPool(count, work)
    try:
        yield pool
    finally:
        pool.kill()


def _waitable(process: ForkProcess, receiver: Connection) -> tuple[int, Connection]:
    return process.sentinel, receiver


def _check_ended(process: ForkProcess, receiver: Connection) -> None:
    """Raise the error of a process that has ended, or is about to."""
    with suppress(EOFError, OSError):  # OSError: killed while it was sending
        if receiver.poll():  # before the join: a long message waits until it is read
            message, where, fix, status = json.loads(receiver.recv_bytes())
            raise UserError(message, where=where, fix=fix, status=Exit(status))
    process.join()
    assert process.exitcode is not None
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        warn(f"process {process.pid} was killed by {name}{hint}; its unfinished work is repeated")
    elif process.exitcode:
        raise RuntimeError(f"process {process.pid} ended with status {process.exitcode}")


def _run_worker(work: Work, index: int, progress: Any, sender: Connection, parent: int) -> None:
    gc.freeze()  # collections neither visit nor copy the forked objects
    die_with_parent()
    if os.getppid() != parent:
        return  # it died before the line above
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends this process

    def advance(units: int) -> None:
        progress[index] += units

    try:
        work(index, advance)
    except UserError as error:
        message = [error.message, error.where, error.fix, error.status]
        sender.send_bytes(json.dumps(message).encode())
    os._exit(0)  # at once: exit handlers of the parent must not run here


@contextmanager
def _without_tokenizer_threads() -> Iterator[None]:
    """A forked process must not use the threads of tokenizers, which are not forked with it."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
