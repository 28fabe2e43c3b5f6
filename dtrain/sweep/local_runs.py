"""Runs of a sweep as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.hardware import gpus, job_cores
from dtrain.core.ownership import open_in_place
from dtrain.core.processes import die_with_parent
from dtrain.launching.commands import launcher_environment
from dtrain.sweep.record import SeedRun, SweepDir

LOCK_SECONDS = 60.0  # a rank whose launcher was killed may take a while to end


class LocalRuns:
    """Starts each run as `dtrain run`, on cores or GPUs of its own.

    The processes die with this one, however it ends.

    Args:
        folder: of the sweep.
        base: the recipe that the sweep varies.
        at_once: runs at the same time.

    Raises:
        UserError: there are fewer GPUs than runs at once.
    """

    poll_seconds = 0.2

    def __init__(self, folder: SweepDir, base: Recipe, at_once: int) -> None:
        self._folder, self.capacity = folder, at_once
        self._environment = launcher_environment(os.environ, base.device)
        self._slots = _slots(base, at_once)
        self._processes: dict[str, tuple[subprocess.Popen[bytes], int]] = {}

    def start(self, batch: Sequence[SeedRun]) -> None:
        """Start runs whose recipes are in their folders.

        Raises:
            UserError: another process uses a run's folder.
        """
        for run in batch:
            folder = self._folder.run(run.name)
            folder.lock(wait_seconds=LOCK_SECONDS).release()
            log = self._folder.log(run.name)
            log.parent.mkdir(parents=True, exist_ok=True)
            used = {slot for _, slot in self._processes.values()}
            slot = next(number for number in range(len(self._slots)) if number not in used)
            handle = open_in_place(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with open(handle, "ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "dtrain", "run", str(folder.recipe)],
                    env=self._environment | self._slots[slot],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C comes to this process alone
                    preexec_fn=_DieWith(os.getpid()),
                )
            self._processes[run.name] = process, slot

    def refresh(self) -> None:
        """Nothing: the system knows the processes."""

    def ended(self, run: SeedRun) -> int | None:
        """The exit status of a run that has ended; None while it works."""
        process, _ = self._processes[run.name]
        status = process.poll()
        if status is None:
            return None
        del self._processes[run.name]
        return status if status >= 0 else 128 - status

    def stop(self, run: SeedRun) -> None:
        """Ask a run to save and end."""
        self._processes[run.name][0].send_signal(signal.SIGTERM)

    def adopt(self, runs: Sequence[SeedRun]) -> list[SeedRun]:
        """The runs of an earlier start that still work: none, they died with it."""
        return []

    def interrupt(self) -> None:
        """Ask all runs to save and end, and wait for them."""
        for process, _ in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process, _ in self._processes.values():
            process.wait()


class _DieWith:
    """Run in a child before its program: have the kernel kill it when its parent dies."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def __call__(self) -> None:
        die_with_parent()
        if os.getppid() != self._parent:
            os._exit(1)  # it died before the line above


def _slots(base: Recipe, at_once: int) -> list[dict[str, str]]:
    """For each of the runs at once, variables that keep it on cores or GPUs of its own."""
    processes = base.launch.ranks_on_node(1)
    threads = {} if os.environ.get("OMP_NUM_THREADS") else _threads(at_once * processes)
    devices = [row.get("uuid", "") for row in gpus() or []] if base.device != "cpu" else []
    if not any(devices) or at_once == 1:
        return [threads] * at_once
    share = len(devices) // at_once
    needed = base.launch.ranks_on_node(max(1, share))
    if share < needed:
        message = f"{at_once} runs at once need {at_once * needed} GPUs; there are {len(devices)}"
        raise UserError(message, where="at_once", fix=f"at_once: {len(devices) // needed or 1}")
    groups = [devices[i * share : (i + 1) * share] for i in range(at_once)]
    return [{**threads, "CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def _threads(processes: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(max(1, job_cores() // processes))}
