"""The same jobs from Python, through submitit: one recipe, or an array of several.

    jobs = submit(["a.yaml", "b.yaml"], folder="runs/submitit", nodes=2, gpus_per_node=8)

submitit's own script starts `Training` on the first node; `Training` starts the ranks on all of
them with srun, as slurm/job.sh does, and asks the same `attempt.end` whether to try again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import submitit

from dtrain.config.load import dump, load_recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_atomic
from dtrain.core.run_dir import RunDir
from dtrain.launching.attempt import begin, end
from dtrain.launching.commands import torchrun_command

WARN_SECONDS = 300


@dataclass
class Training:
    """One recipe's run, as submitit calls it; paths are taken from `working`."""

    recipe: str
    overrides: list[str] = field(default_factory=list)
    working: str = field(default_factory=os.getcwd)

    def __call__(self) -> str:
        """Train; return the run folder.

        Raises:
            UserError: it did not finish, and another try cannot help.
        """
        os.chdir(self.working)
        run, command = self._begin()
        status = self._train(command)
        if "SLURM_JOB_ID" in os.environ:
            signal.signal(
                signal.SIGTERM, signal.SIG_DFL
            )  # submitit ignores it, and a requeue waits
            # The warning goes to the ranks, not here; nobody else asks them to stop. The step's own
            # status may be that of a rank which srun ended because another had ended before it.
            status = end(run, status, says_go_on(run), os.environ)
        if status != Exit.FINISHED:
            what = f"ended with status {status}"
            raise UserError(what, where=str(run), fix="see outcome.json there")
        return str(run)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit starts next time when its executor's own signal came: the same."""
        return submitit.helpers.DelayedSubmission(self)

    def _begin(self) -> tuple[Path, list[str]]:
        if "SLURM_JOB_ID" in os.environ:
            plan = [sys.executable, "-m", "dtrain.planning.fit_gate", self.recipe, *self.overrides]
            if subprocess.run(plan, check=False).returncode:
                raise UserError("the plan refuses it", where=self.recipe, fix="see above")
            return begin(self.recipe, self.overrides, os.environ)
        recipe = load_recipe(self.recipe, self.overrides)
        run = Path(recipe.output.folder).expanduser().absolute()
        output = recipe.output.model_copy(update={"folder": str(run)})
        write_atomic(RunDir(run).recipe, dump(recipe.model_copy(update={"output": output})))
        ranks = recipe.launch.processes
        return run, torchrun_command(
            RunDir(run).recipe, 1 if ranks == "auto" and recipe.device == "cpu" else ranks
        )

    def _train(self, command: Sequence[str]) -> int:
        process = subprocess.Popen(command)
        before = signal.getsignal(signal.SIGUSR2)

        def save_first(number: int, frame: FrameType | None) -> None:
            process.send_signal(signal.SIGUSR1)
            process.wait()
            if callable(before):
                before(number, frame)

        if "SLURM_JOB_ID" not in os.environ:  # there it is `end` that decides, not submitit
            signal.signal(signal.SIGUSR2, save_first)
        else:
            signal.signal(signal.SIGUSR2, lambda number, frame: process.send_signal(signal.SIGUSR1))
        return process.wait()


def says_go_on(run: Path) -> bool:
    """Whether the ranks saved and ended because they were asked to."""
    return bool(RunDir(run).read_exit_report().get("status") == Exit.INTERRUPTED)


def submit(
    recipes: Sequence[str],
    *,
    folder: Path | str,
    overrides: Sequence[str] = (),
    executor: str = "slurm",
    nodes: int = 1,
    gpus_per_node: int = 8,
    timeout_minutes: int = 24 * 60,
    **more: Any,
) -> list[submitit.Job[str]]:
    """Submit recipes; several become one array.

    Args:
        recipes: files or names of shipped recipes; each is checked before anything is submitted.
        folder: where submitit keeps its scripts and logs.
        overrides: `key=value`, for every one of them.
        executor: slurm, or local for this machine.
        more: parameters of submitit's executor, for example slurm_partition.

    Raises:
        UserError: a recipe is wrong.
    """
    for recipe in recipes:
        load_recipe(recipe, overrides)
    chosen = submitit.AutoExecutor(folder=folder, cluster=executor)
    chosen.update_parameters(nodes=nodes, tasks_per_node=1, timeout_min=timeout_minutes)
    if executor == "slurm":
        chosen.update_parameters(
            gpus_per_node=gpus_per_node,
            slurm_use_srun=False,  # Training starts srun itself
            slurm_signal_delay_s=WARN_SECONDS,
            slurm_additional_parameters={"requeue": True, "comment": "dtrain"},
        )
    chosen.update_parameters(**more)
    trainings = [Training(recipe, list(overrides)) for recipe in recipes]
    if len(trainings) == 1:
        return [chosen.submit(trainings[0])]
    with chosen.batch():
        jobs = [chosen.submit(training) for training in trainings]
    return jobs
