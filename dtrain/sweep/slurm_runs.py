"""Runs of a sweep as arrays of Slurm jobs, through submitit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dtrain.config.sweep import SlurmJobs
from dtrain.core.errors import Exit, UserError
from dtrain.launching import slurm
from dtrain.launching.attempts import read_attempts
from dtrain.launching.submit import COMMENT, CORES_A_GPU, CORES_WITHOUT_GPU, MEMORY_A_GPU, job_name
from dtrain.submitit_jobs import submit
from dtrain.sweep.record import SeedRun, SweepDir

MAX_ARRAY_SIZE = 1000  # Slurm's MaxArraySize is 1001 unless set
MEMORY_WITHOUT_GPU = 32  # GB


class SlurmRuns:
    """Submits runs; those that are submitted together are one array.

    The jobs do not depend on this process: another start finds them by the array's comment.

    Args:
        folder: of the sweep.
        settings: of each job.
        at_once: jobs of an array at the same time.
        is_bounded: hold jobs back until a run has ended; otherwise all are submitted at once.
    """

    poll_seconds = 2.0

    def __init__(
        self, folder: SweepDir, settings: SlurmJobs, at_once: int, *, is_bounded: bool
    ) -> None:
        self._folder, self._settings, self._at_once = folder, settings, at_once
        self.capacity = at_once if is_bounded else MAX_ARRAY_SIZE
        self._queued: dict[str, str] | None = {}  # None: Slurm has not answered
        self._submitted: set[str] = set()  # since the queue was last asked

    def start(self, batch: Sequence[SeedRun]) -> None:
        """Submit runs whose recipes are in their folders, as one array.

        Raises:
            UserError: Slurm refuses.
        """
        names = ",".join(run.name for run in batch)
        jobs = submit(
            [str(self._folder.run(run.name).recipe) for run in batch],
            folder=self._folder.submitit,
            nodes=self._settings.nodes,
            gpus_per_node=self._settings.gpus,
            timeout_minutes=self._settings.minutes,
            **self._options(f"{COMMENT}{self._folder.path}:{names}"),
        )
        for run, job in zip(batch, jobs, strict=True):
            run.job = str(job.job_id)
            self._submitted.add(run.job)

    def _options(self, comment: str) -> dict[str, Any]:
        gpus = self._settings.gpus
        options: dict[str, Any] = {
            "slurm_job_name": job_name(f"sweep-{self._folder.path.name}"),
            "slurm_array_parallelism": self._at_once,
            "cpus_per_task": gpus * CORES_A_GPU or CORES_WITHOUT_GPU,
            "mem_gb": gpus * int(MEMORY_A_GPU) or MEMORY_WITHOUT_GPU,
            "slurm_additional_parameters": {"requeue": True, "comment": comment},
        }
        for name in ("partition", "account", "qos"):
            if (value := getattr(self._settings, name)) is not None:
                options[f"slurm_{name}"] = value
        return options

    def refresh(self) -> None:
        """Ask Slurm which jobs are waiting or running."""
        self._queued, self._submitted = None, set()
        with suppress(UserError):  # it does not answer: the next time
            self._queued = {job.job: job.comment for job in slurm.queue(as_array=True)}

    def ended(self, run: SeedRun) -> int | None:
        """The status of a run whose job is over, if it left no report; None before."""
        if self._queued is None or run.job in self._queued or run.job in self._submitted:
            return None
        return Exit.CRASHED

    def stop(self, run: SeedRun) -> None:
        """Cancel a run's job: its ranks get SIGTERM, save and end."""
        slurm.cancel([run.job])

    def adopt(self, runs: Sequence[SeedRun]) -> list[SeedRun]:
        """The runs of an earlier start whose jobs wait or work, or have ended since.

        Raises:
            UserError: Slurm does not answer.
        """
        jobs: dict[str, str] = {}
        prefix = f"{COMMENT}{self._folder.path}:"
        for job in slurm.queue(as_array=True):
            if job.comment.startswith(prefix):
                _, _, index = job.job.partition("_")
                names = job.comment.removeprefix(prefix).split(",")
                if index.isdecimal() or len(names) == 1:
                    jobs[names[int(index or 0)]] = job.job
        for run in runs:
            attempts = read_attempts(self._folder.run(run.name))
            known = [run.job, *(attempt.job for attempt in attempts)]
            run.job = jobs.get(run.name) or next((job for job in known if job), "")
        return [run for run in runs if run.job]

    def interrupt(self) -> None:
        """Nothing: the jobs go on, and the next start follows them."""
