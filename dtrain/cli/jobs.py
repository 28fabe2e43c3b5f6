"""`dtrain jobs`, `status`, `logs` and `cancel`: what became of what was submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")]


def jobs() -> None:
    """List your dtrain jobs that wait or run."""
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
    """Say where a run's job is: why it waits, how far it is, what became of each attempt."""
    from dtrain.launching.status import status as lines_of

    print("\n".join(lines_of(run.absolute())))


def logs(run: RunFolder, follow: Follow = False) -> None:
    """Print the log of a run's newest job."""
    from dtrain.launching.status import follow as parts_of

    for part in parts_of(run.absolute(), until_over=follow):
        print(part, end="", flush=True)


def cancel(run: RunFolder) -> None:
    """Cancel a run's jobs; what is saved stays, and submitting again goes on from there."""
    from dtrain.launching import slurm
    from dtrain.launching.status import queued_jobs

    numbers = [job.job for job in queued_jobs(run.absolute())]
    if not numbers:
        print("no job of this run is waiting or running")
        return
    slurm.cancel(numbers)
    print(f"cancelled job {' and '.join(numbers)}")
