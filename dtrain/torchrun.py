"""torchrun that ends with its workers' exit status, passes signals on, and keeps quiet.

`python -m dtrain.torchrun …` takes torchrun's own options and differs from it in these. Its exit
status is the workers', not 1. A signal reaches the workers, which save and end, and are not killed
after thirty seconds; Ctrl-C twice kills them at once. `--nproc-per-node=auto` is one process on a
machine without a GPU, not one a core. Ranks are bound to the cores near their GPU. Ranks meet in a
file, or on several nodes in a store without pickles (dtrain/distributed/rendezvous.py). What a
worker has printed is not repeated, and nothing is left in /tmp.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import FrameType

from dtrain.core.interrupts import (
    INTERRUPTED_EARLY,
    catch_stop_signals,
    end_on_interrupt,
    release_interrupts,
    say_in_handler,
)

if __name__ == "__main__":  # the imports below take seconds
    end_on_interrupt(INTERRUPTED_EARLY)
    release_interrupts()

import psutil
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dtrain.core.errors import Exit, UserError
from dtrain.core.hardware import oom_kills
from dtrain.core.locks import LOCK_FILE, FolderLock
from dtrain.core.output import protect_output
from dtrain.core.ownership import check_own_folder, keep_private
from dtrain.distributed.rendezvous import choose_rendezvous, restrict_stores
from dtrain.launching.commands import LAUNCHER, worker_environment

# A rank has failed, and the others wait for it: their work is lost anyway.
SECONDS_FOR_THE_OTHERS = 10
FOLDER_PREFIX = "torchelastic_"
# Statuses whose cause a worker has printed; the most specific come first.
_EXPLAINED = (
    Exit.USER_ERROR,
    Exit.NON_FINITE,
    Exit.OUT_OF_MEMORY,
    Exit.GATE_FAILED,
    Exit.DIVERGED,
    Exit.HANG,
)


_OOM_KILLED = """\
error: rank {rank} was killed by the kernel: the host memory of this job ran out
    → ask for more memory (sbatch --mem), or start fewer processes on a node"""


class Signals:
    """Passes signals on to the workers, each of which leads its own session."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def listen(self) -> None:
        """Catch the signals from now on."""
        catch_stop_signals(self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.seen:
            number = signal.SIGKILL  # Ctrl-C twice; checkpoints stay whole
        self.seen.add(number)
        workers = [child for child in psutil.Process().children() if _leads_session(child.pid)]
        if not workers:  # none has started, or all have ended
            if number != signal.SIGINT:
                raise SystemExit(Exit.INTERRUPTED)
            say_in_handler(INTERRUPTED_EARLY)
            raise SystemExit(Exit.CTRL_C)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                worker.send_signal(number)


def main(argv: list[str] | None = None) -> int:
    """Run torchrun; return the workers' exit status."""
    protect_output()
    keep_private()
    arguments = torchrun.parse_args(sys.argv[1:] if argv is None else argv)
    has_gpu = torch.cuda.is_available()
    if arguments.nproc_per_node == "auto":
        arguments.nproc_per_node = str(max(1, torch.cuda.device_count()))
    processes = torchrun.determine_local_world_size(arguments.nproc_per_node)
    os.environ[LAUNCHER] = str(os.getpid())
    if sys.getfilesystemencoding() != "utf-8":  # names and texts of a run may hold any character
        os.environ["PYTHONUTF8"] = "1"
    # torchrun's own handler kills slow workers; it gets a signal that is never sent here.
    arguments.signals_to_handle = "SIGQUIT"
    # Older and newer versions of torchrun lack some of these options.
    if getattr(arguments, "shutdown_timeout", 0) is None:
        arguments.shutdown_timeout = SECONDS_FOR_THE_OTHERS
    if getattr(arguments, "numa_binding", "") is None and can_bind_to_numa_nodes(processes):
        arguments.numa_binding = "node"
    if not os.environ.get("LOGLEVEL"):
        logging.disable(logging.ERROR)
    restrict_stores()
    signals, killed_before = Signals(), oom_kills()
    signals.listen()
    try:
        os.environ.update(worker_environment(os.environ, processes, has_gpu))
        with private_folder(arguments) as folder:
            choose_rendezvous(arguments, folder, os.environ)
            torchrun.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except ChildFailedError as error:
        return status_of(error.failures, signals.seen, oom_kills() > killed_before)
    return Exit.FINISHED


def can_bind_to_numa_nodes(ranks: int) -> bool:
    """Whether each rank can be bound to cores near its GPU; torchrun itself ends where it cannot.

    It needs numactl, and cores of this job on the NUMA node of every GPU.
    """
    if not 0 < ranks <= torch.cuda.device_count():
        return False
    try:
        binding = importlib.import_module("torch.numa.binding")
        near = binding.NumaOptions(affinity_mode=binding.AffinityMode.NODE)
        cores_near = binding._get_validated_logical_cpus_to_bind_to
        index = next(iter(inspect.signature(cores_near).parameters))  # gpu_index or device_index
        for gpu in range(ranks):
            cores_near(**{index: gpu}, numa_options=near)
    except Exception:  # torch's own, which may be anything in another version
        return False
    return True


def remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose launcher is dead: nobody holds their lock."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError, UserError):
            check_own_folder(folder)
            # A lock file without a name in it was created, but maybe not locked yet.
            if (folder / LOCK_FILE).stat().st_size and (lock := FolderLock(folder)).acquire():
                shutil.rmtree(folder)
                lock.release()


@contextmanager
def private_folder(arguments: Namespace) -> Iterator[Path]:
    """Yield a folder that only this user can open, and remove it at the end.

    torchrun's error files go there, which it otherwise leaves in /tmp at each start. Logs that the
    command line asks for stay. What a killed launcher left there is removed at the next start.
    """
    remove_abandoned(Path(gettempdir()))
    with TemporaryDirectory(prefix=FOLDER_PREFIX) as folder, FolderLock(Path(folder)):
        if arguments.redirects == arguments.tee == "0" and not arguments.log_dir:
            arguments.log_dir = folder
        yield Path(folder)


def status_of(
    failures: Mapping[int, ProcessFailure], signals_seen: set[int], memory_ran_out: bool = False
) -> int:
    """The exit status for the ranks that failed; prints what no worker could print.

    A rank that fails takes the others down with it, so the most specific status counts.

    Args:
        failures: by rank.
        signals_seen: those that this process was sent.
        memory_ran_out: the kernel has killed a process of this job for it since the start.
    """
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    for status in _EXPLAINED:
        if status in codes.values():
            return status
    if memory_ran_out and -signal.SIGKILL in codes.values():
        rank = min(rank for rank, code in codes.items() if code == -signal.SIGKILL)
        print(_OOM_KILLED.format(rank=rank), file=sys.stderr)
        return Exit.OUT_OF_MEMORY
    # torchrun ends the ranks that are left with SIGTERM, whatever ended the first.
    stopped = {Exit.INTERRUPTED, Exit.CTRL_C, -signal.SIGTERM} | {-n for n in signals_seen}
    if stopped.issuperset(codes.values()) and (signals_seen or Exit.INTERRUPTED in codes.values()):
        if Exit.INTERRUPTED in codes.values() or Exit.CTRL_C not in codes.values():
            return Exit.INTERRUPTED
        print(INTERRUPTED_EARLY, file=sys.stderr)
        return Exit.CTRL_C
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    if killed and Exit.CRASHED not in codes.values():  # a crash has left its traceback
        print(_killed(killed), file=sys.stderr)
    return Exit.CRASHED


def _killed(signals: Mapping[int, int]) -> str:
    rank = min(signals, key=lambda r: signals[r] == signal.SIGTERM)  # rarely the cause, see above
    name = signal.Signals(signals[rank]).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return (
        f"error: rank {rank} was killed by {name}{hint}\n"
        "    → the same command resumes from the newest checkpoint"
    )


def _leads_session(process: int) -> bool:
    try:
        return os.getsid(process) == process
    except ProcessLookupError:
        return False


if __name__ == "__main__":
    sys.exit(main())
