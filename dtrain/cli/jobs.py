"""`dtrain jobs`, `status`, `logs` and `cancel`: jobs that were submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Print new lines until the job is over.")
]


def jobs() -> None:
    """List your dtrain jobs that are waiting or running."""
    from dtrain.launching import slurm
    from dtrain.launching.status import queue_line
    from dtrain.launching.submit import COMMENT

    mine = [job for job in slurm.queue() if job.comment.startswith(COMMENT.rstrip(":"))]
    for job in mine:
        run = job.comment.removeprefix(COMMENT) if job.comment.startswith(COMMENT) else ""
        print(f"{queue_line(job)}  {run}".rstrip())
    if not mine:
        print("none; dtrain submit RECIPE starts one")


def status(run: RunFolder) -> None:
    """Print the state of a run's job: why it waits, its progress, and how each attempt ended."""
    from dtrain.launching.status import status as lines_of

    print("\n".join(lines_of(run.absolute())))


def logs(run: RunFolder, follow_log: Follow = False) -> None:
    """Print the log of a run's newest job."""
    from dtrain.launching.status import follow

    for text in follow(run.absolute(), until_over=follow_log):
        print(text, end="", flush=True)


def cancel(run: RunFolder) -> None:
    """Cancel a run's jobs; its checkpoints stay, and submitting it again resumes."""
    from dtrain.launching import slurm
    from dtrain.launching.status import queued_jobs

    job_ids = [job.job for job in queued_jobs(run.absolute())]
    if not job_ids:
        print("no job of this run is waiting or running")
        return
    slurm.cancel(job_ids)
    print(f"cancelled job {' and '.join(job_ids)}")
