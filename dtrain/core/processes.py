"""The same work in several processes of this machine, with one voice."""

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
LOOK_EVERY_SECONDS = 0.2

Tell = Callable[[int], None]


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_at_once(status: int) -> NoReturn:
    """End this process without destructors and exit handlers; what was printed is kept."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader may be gone
            stream.flush()
    os._exit(status)


class WorkerPool:
    """Processes that do the same work; see `crew`."""

    def __init__(self, count: int, work: Callable[[int, Tell], None]) -> None:
        context = multiprocessing.get_context("fork")
        self._told = context.RawArray("q", count)  # a slot each: a lock could die with its holder
        self._members: dict[int, tuple[ForkProcess, Connection]] = {}
        for number in range(count):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (work, number, self._told, sender, os.getpid())
            process = context.Process(target=_member, args=arguments, daemon=True)
            with _quiet_tokenizers():
                process.start()
            sender.close()
            self._members[process.sentinel] = process, receiver

    def join(self, advance: Tell) -> None:
        """Wait for all; `advance` hears the sum of what they tell.

        Raises:
            UserError: the first that one of them raised.
        """
        known, alive = 0, list(self._members.values())
        while alive:
            ended = wait([one for p, r in alive for one in (p.sentinel, r)], LOOK_EVERY_SECONDS)
            advance((now := sum(self._told)) - known)
            known = now
            for process, receiver in list(alive):
                if process.sentinel in ended or receiver in ended:
                    _judge(process, receiver)
                    alive.remove((process, receiver))

    def end(self) -> None:
        """End those that are left."""
        for process, _ in self._members.values():
            process.kill()
            process.join()


@contextmanager
def worker_pool(count: int, work: Callable[[int, Tell], None]) -> Iterator[WorkerPool]:
    """Run `work(number, tell)` for number 0 … count - 1, each in a process of its own.

    The processes are forked: they start at once and need no copy of their inputs. So `work` must
    touch no thread, GPU or connection of this process, and progress is shown from here. One that
    is killed is told, and the others go on: whether all is done is for the caller to see.

    Args:
        count: of processes.
        work: what each of them does; it calls `tell(units)` for what it has done.
    """
    members = WorkerPool(count, work)
    try:
        yield members
    finally:
        members.end()


def _judge(process: ForkProcess, receiver: Connection) -> None:
    with suppress(EOFError, OSError):  # OSError: killed while it was sending
        if receiver.poll():  # before the join: a long message waits until it is read
            what, where, fix, status = json.loads(receiver.recv_bytes())
            raise UserError(what, where=where, fix=fix, status=Exit(status))
    process.join()
    assert process.exitcode is not None
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        warn(f"process {process.pid} was killed by {name}{hint}; what it was about is done again")
    elif process.exitcode:
        raise RuntimeError(f"process {process.pid} ended with status {process.exitcode}")


def _member(
    work: Callable[[int, Tell], None], number: int, told: Any, sender: Connection, parent: int
) -> None:
    gc.freeze()  # what was forked is not looked through, nor copied, at every collection
    die_with_parent()
    if os.getppid() != parent:
        return  # it died before the line above
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends this process

    def tell(units: int) -> None:
        told[number] += units

    try:
        work(number, tell)
    except UserError as error:
        told = [error.message, error.where, error.fix, error.status]
        sender.send_bytes(json.dumps(told).encode())
    os._exit(0)  # at once: what else this process was forked with is not its own to end


@contextmanager
def _quiet_tokenizers() -> Iterator[None]:
    """A forked process must not use the tokenizers' threads, which are not forked with it."""
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
