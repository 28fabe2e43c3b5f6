"""The same jobs from Python, through submitit: one recipe, or an array of several.

    jobs = submit(["a.yaml", "b.yaml"], folder="runs/submitit", nodes=2, gpus_per_node=8)

submitit's own script starts `Training` on the first node, and `Training` runs the same supervisor
as slurm/job.sh.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import submitit

from dtrain.config.load import dump, load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_atomic
from dtrain.core.ownership import keep_private, make_private_folder
from dtrain.core.run_dir import RunDir
from dtrain.launching.commands import ranks_per_node, run_dir_of, torchrun_command, with_run_dir
from dtrain.launching.requeue_policy import PERMANENT_FAILURES
from dtrain.planning.known_models import check_downloaded, check_trainable
from dtrain.supervisor import Supervisor

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
            UserError: it did not finish, and another attempt cannot help.
        """
        keep_private()
        os.chdir(self.working)
        recipe = load_recipe(self.recipe, self.overrides)
        run = run_dir_of(recipe)
        if "SLURM_JOB_ID" in os.environ:
            supervisor = Supervisor(os.environ, is_warning_sent_to_ranks=True)
            signal.signal(signal.SIGUSR2, supervisor.warn)
            status = supervisor.run(recipe)
        else:
            status = self._train_here(recipe, run)
        if status != Exit.FINISHED:
            message = f"ended with status {status}"
            raise UserError(
                message, where=str(run.path), fix=f"see {run.start_exit_report.name} there"
            )
        return str(run.path)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit starts next time when its executor's own signal came: the same."""
        return submitit.helpers.DelayedSubmission(self)

    def _train_here(self, recipe: Recipe, run: RunDir) -> int:
        """Train on this machine; submitit's own signal makes the ranks save first.

        Returns:
            Exit status of the ranks, unless submitit's handler ends this process to requeue it.
        """
        run.lock().release()
        run.request(dump(with_run_dir(recipe, run)))
        requeue = signal.getsignal(signal.SIGUSR2)
        asked: list[tuple[int, FrameType | None]] = []
        process: subprocess.Popen[bytes] | None = None

        def save_first(number: int, frame: FrameType | None) -> None:
            # It interrupts `Popen.wait`, whose lock a second wait in here would never get.
            asked.append((number, frame))
            with suppress(OSError):
                write_atomic(run.stop, "")  # for ranks that do not listen yet
            if process is not None:
                process.send_signal(signal.SIGUSR1)

        signal.signal(signal.SIGUSR2, save_first)
        process = subprocess.Popen(torchrun_command(run.start_recipe, ranks_per_node(recipe, 0)))
        status = process.wait()
        can_help = status not in (Exit.FINISHED, *PERMANENT_FAILURES)
        if asked and can_help and callable(requeue):
            requeue(*asked[0])
        return status


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
        folder: where submitit keeps its scripts, logs and pickles; for this user alone.
        overrides: `key=value`, for every one of them.
        executor: slurm, or local for this machine.
        more: parameters of submitit's executor, for example slurm_partition.

    Raises:
        UserError: a recipe is wrong, its base was not downloaded, or the folder is another user's.
    """
    for address in recipes:
        recipe = load_recipe(address, overrides)
        check_trainable(recipe.model.base)
        if executor == "slurm" and os.environ.get("DTRAIN_FORCE") != "1":
            check_downloaded(recipe, "DTRAIN_FORCE=1")
    # The jobs unpickle what they find there. submitit replaces %j and the like by the job's id.
    make_private_folder(Path(str(folder).partition("%")[0]))
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
