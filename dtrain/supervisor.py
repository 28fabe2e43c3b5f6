"""Supervise one attempt of a Slurm job: plan, begin, preflight, train, end.

slurm/job.sh becomes `python -m dtrain.supervisor SCRIPT RECIPE [key=value …]`, so Slurm's
signals come here. The recipe is parsed once, and once more by each rank.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from dtrain.config.checks import check_batches
from dtrain.config.load import dump, load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.interrupts import say_in_handler
from dtrain.core.os_errors import explained_os_errors
from dtrain.core.output import protect_output
from dtrain.core.ownership import keep_private
from dtrain.core.run_dir import RunDir
from dtrain.launching import slurm
from dtrain.launching.attempts import begin_attempt, end_attempt
from dtrain.launching.commands import (
    COMMAND,
    ranks_per_node,
    run_dir_of,
    step_command,
    with_run_dir,
)
from dtrain.launching.network import rendezvous_endpoint
from dtrain.launching.preflight import check_allocation, handle_faults
from dtrain.planning.fit_gate import check_job
from dtrain.planning.known_models import check_downloaded, check_trainable

LOCK_SECONDS = 120  # a worker whose launcher was killed may take a while to end
REQUEUE_SECONDS = 600


class Supervisor:
    """One attempt of a Slurm job.

    Args:
        environ: variables of the job.
        is_warning_sent_to_ranks: Slurm announces the end of the job to them and not to this
            process, so it was announced if they stopped.

    Attributes:
        is_warned: whether Slurm has announced the end of the job.
    """

    def __init__(
        self, environ: Mapping[str, str], *, is_warning_sent_to_ranks: bool = False
    ) -> None:
        self.is_warned = False
        self._is_warning_sent_to_ranks = is_warning_sent_to_ranks
        self._environ = environ
        self._run: RunDir | None = None  # once it is locked: it may be another run's
        self._step: subprocess.Popen[bytes] | None = None

    def run(self, recipe: Recipe, script: Path | None = None, words: Sequence[str] = ()) -> int:
        """Make the attempt; return the exit status of the job.

        Args:
            recipe: to train.
            script: of the job; None leaves out the preflight.
            words: arguments of the script.

        Raises:
            UserError: another attempt cannot help: the recipe is wrong, or it failed too often.
        """
        check_trainable(recipe.model.base)
        check_job(recipe, self._environ)
        if self._environ.get("DTRAIN_FORCE") != "1":
            check_downloaded(recipe, "DTRAIN_FORCE=1")
        allocation = slurm.current_allocation(self._environ)
        run = self.begin(recipe, allocation)
        wants_preflight = self._environ.get("DTRAIN_PREFLIGHT", "on") != "off"
        if script and wants_preflight and not self.is_warned:
            faults = check_allocation(recipe, run.start_recipe, run.slurm, allocation)
            if faults:
                handle_faults(faults, run, [str(script), *words], self._environ)
                return Exit.CRASHED
        status: int = Exit.INTERRUPTED
        if not self.is_warned:
            status = self._train(self.command(recipe, run, allocation))
        return self.end(run, status)

    def begin(self, recipe: Recipe, allocation: slurm.Allocation) -> RunDir:
        """Prepare the run folder and record the attempt; return the run folder.

        Raises:
            UserError: another attempt cannot help: the recipe is wrong, or it failed too often.
        """
        ranks = ranks_per_node(recipe, allocation.gpus)
        if isinstance(ranks, int):
            check_batches(recipe, len(allocation.nodes) * ranks)
        run = run_dir_of(recipe)
        lock = run.lock(wait_seconds=LOCK_SECONDS)
        try:
            run.request(dump(with_run_dir(recipe, run)))
        finally:
            lock.release()
        begin_attempt(run, allocation, self._environ)
        self._run = run
        return run

    def command(self, recipe: Recipe, run: RunDir, allocation: slurm.Allocation) -> list[str]:
        """The command that trains. Nothing holds its free port until the ranks start.

        Raises:
            UserError: DTRAIN_INTERFACE names no interface of this machine.
        """
        return step_command(
            [str(run.start_recipe)],
            nodes=len(allocation.nodes),
            ranks=ranks_per_node(recipe, allocation.gpus),
            endpoint=rendezvous_endpoint(self._environ, allocation.nodes[0]),
            cores=allocation.cores,
        )

    def _train(self, command: Sequence[str]) -> int:
        """Start the ranks on all nodes and wait for them; return the exit status of srun."""
        # Slurm ends the step by itself. SIG_IGN instead of a handler would be inherited by srun.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        environ = {**os.environ, COMMAND: shlex.join(sys.orig_argv)}
        self._step = subprocess.Popen(command, env=environ)
        status = self._step.wait()  # a signal does not end the wait
        return status if status >= 0 else 128 - status

    def end(self, run: RunDir, status: int) -> int:
        """Record how the attempt ended, and requeue the job if that can help.

        This is never decided in a handler of SIGTERM: it would revive a job that scancel ended.

        Args:
            run: the run folder.
            status: exit status of the step.

        Returns:
            Exit status of the job, if it ends here.
        """
        if self._is_warning_sent_to_ranks:
            self.is_warned |= run.read_exit_report().get("status") == Exit.INTERRUPTED
        decision = end_attempt(run, status, self.is_warned, self._environ)
        if decision.action == "requeue":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or Slurm waits for its KillWait
            slurm.requeue(self._environ["SLURM_JOB_ID"])
            time.sleep(REQUEUE_SECONDS)  # until Slurm ends this process
        return decision.status

    def warn(self, number: int, frame: FrameType | None) -> None:
        """Handle Slurm's warning that the job ends soon: ask the ranks to save and stop."""
        self.is_warned = True
        say_in_handler(slurm.stamped("Slurm warned; the ranks save and stop"))
        if self._run is not None:
            with suppress(OSError):
                self._run.stop.touch()  # for ranks that do not listen yet
        if self._step is not None:
            self._step.send_signal(signal.SIGUSR1)


def main(argv: list[str] | None = None) -> int:
    """Supervise an attempt; return the exit status of the job."""
    protect_output()
    keep_private()
    script, address, *overrides = sys.argv[1:] if argv is None else argv
    supervisor = Supervisor(os.environ)
    signal.signal(signal.SIGUSR1, supervisor.warn)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # job.sh blocks it until here
    try:
        with explained_os_errors():
            return supervisor.run(load_recipe(address, overrides), Path(script), overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
