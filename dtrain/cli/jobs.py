"""`dtrain submit`, `preflight`, `jobs`, `status`, `logs` and `cancel`: jobs of Slurm."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress, path
from dtrain.core.errors import Exit
from dtrain.core.output import wrapped

if TYPE_CHECKING:
    from dtrain.config.schema import Recipe
    from dtrain.core.check_report import CheckReport

Nodes = Annotated[int, typer.Option(min=1, help="Nodes.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each node.")]
Time = Annotated[str, typer.Option(help="Longest run, for example 24:00:00.")]
Cores = Annotated[int | None, typer.Option(min=1, help="Cores of each node; 8 a GPU.")]
Memory = Annotated[str | None, typer.Option(help="Memory of each node; 64G a GPU.")]
Name = Annotated[str | None, typer.Option(help="As sbatch takes it.")]
After = Annotated[str | None, typer.Option(metavar="JOB", help="Start when this job succeeded.")]
GpuName = Annotated[
    str | None,
    typer.Option(envvar="DTRAIN_GPU", help="Kind of GPU, to refuse what cannot fit: h100-80g."),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", envvar="DTRAIN_FORCE", help="Submit in spite of the plan and missing inputs."
    ),
]
Prepare = Annotated[
    bool, typer.Option("--prepare", help="First tokenize and pack the data in a job without GPUs.")
]
Preflight = Annotated[
    str, typer.Option(help="on, off, or exclude: submit again without the nodes at fault.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the scripts and commands; submit nothing.")
]


def submit(
    recipe: RecipeAddress,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus: Gpus = 8,
    time: Time = "24:00:00",
    cores: Cores = None,
    memory: Memory = None,
    partition: Name = None,
    account: Name = None,
    qos: Name = None,
    after: After = None,
    gpu: GpuName = None,
    force: Force = False,
    prepare: Prepare = False,
    preflight: Preflight = "on",
    dry_run: DryRun = False,
) -> None:
    """Check the recipe, write its job script into the run folder, submit it to Slurm."""
    from dtrain.config.load import load_recipe, with_origins
    from dtrain.launching import submit as jobs
    from dtrain.launching.commands import run_dir_of, with_run_dir
    from dtrain.planning.known_models import position_warnings

    settings = load_recipe(recipe, overrides or [])
    report = check_first(settings, dry_run)
    report.errors = with_origins(report.errors, recipe, overrides or [])
    if not force:
        report.raise_errors()
    for error in report.errors:
        log(f"warning: {error}")
    for line in position_warnings(settings):
        log(f"warning: {line}")
    run, working = run_dir_of(settings), Path.cwd()
    settings = with_run_dir(settings, run)
    if gpus and settings.device != "cpu":
        plan_first(settings, gpu, nodes, gpus, force)
    resources = jobs.Resources(
        nodes=nodes,
        gpus=gpus,
        time=time,
        cores=cores,
        memory=memory,
        partition=partition,
        account=account,
        qos=qos,
        after=after,
        preflight=preflight,
        force=force,
    )
    if dry_run:
        if prepare:
            print(jobs.preparation(settings, resources, working).render())
        print(jobs.training(settings, resources, working).render())
        return
    job_ids = jobs.submit(settings, resources, working, prepare)
    print(f"submitted job {' and then '.join(job_ids)}; next:")
    for verb in ("status", "logs -f", "cancel"):
        print(f"  dtrain {verb} {jobs.quote(run.path)}")


def check_first(recipe: Recipe, dry_run: bool) -> CheckReport:
    """Check the inputs of all stages, and that the nodes of a real job need not download a model.

    Returns:
        Its errors; the notes are logged.
    """
    from dtrain.pipeline.input_checks import check_inputs
    from dtrain.planning.known_models import check_downloaded

    report = check_inputs(recipe)
    if not dry_run:
        with report.collect():
            check_downloaded(recipe, "--force")
    for line in report.notes:
        log(line)
    return report


def plan_first(recipe: Recipe, gpu: str | None, nodes: int, gpus: int, force: bool) -> None:
    """Plan the recipe on the job's GPUs; without their name on the largest that the plan knows.

    A base whose shape the plan does not know is not refused.

    Raises:
        UserError: it does not fit, and is not forced; the GPU is not known; or the recipe
            cannot run on so many ranks.
    """
    from dtrain.planning.fit_gate import check_plan_fits, plan_known_base
    from dtrain.planning.gpus import GPUS, find_gpu
    from dtrain.planning.workload import Cluster

    kind = find_gpu(gpu) if gpu else max(GPUS.values(), key=lambda kind: kind.memory_gib)
    plan = plan_known_base(recipe, Cluster(kind, nodes, recipe.launch.ranks_on_node(gpus)), log)
    if plan is None:
        return
    if not force:
        check_plan_fits(plan, "--force")
    cluster = f"on {kind.name}" if gpu else "on the largest GPUs; --gpu NAME asks about yours"
    log(f"plan: {plan.verdict} {cluster}")


def log(line: str) -> None:
    """Print to stderr; stdout is for programs."""
    print(wrapped(line, sys.stderr), file=sys.stderr)


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", parser=path, help="A run folder.")]
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
    """Print the state of a run: why its job waits, its progress, and how each attempt ended."""
    from dtrain.launching.status import has_jobs
    from dtrain.launching.status import status as status_of_jobs
    from dtrain.monitoring.local_status import local_status

    lines_of = status_of_jobs if has_jobs(run.absolute()) else local_status
    print(wrapped("\n".join(lines_of(run.absolute())), sys.stdout))


def logs(run: RunFolder, follow_log: Follow = False) -> None:
    """Print the log of a run's newest job, or the file that `dtrain run` printed to."""
    from dtrain.launching.status import follow, has_jobs
    from dtrain.monitoring.local_status import follow_local

    texts = follow if has_jobs(run.absolute()) else follow_local
    for text in texts(run.absolute(), until_over=follow_log):
        print(text, end="", flush=True)


def cancel(run: RunFolder) -> None:
    """Cancel a run's jobs, or let a local run save and stop; starting it again resumes."""
    from dtrain.launching import slurm
    from dtrain.launching.status import has_jobs, queued_jobs
    from dtrain.monitoring.local_status import stop_local

    jobs = queued_jobs(run.absolute()) if has_jobs(run.absolute()) else []
    if not jobs:
        print(stop_local(run.absolute()))
        return
    job_ids = [job.job for job in jobs]
    slurm.cancel(job_ids)
    print(f"cancelled job {' and '.join(job_ids)}")


def preflight(recipe: RecipeAddress, overrides: Overrides = None) -> None:
    """Check every node of this allocation (salloc, sbatch): machine, links, all-reduce."""
    from dtrain.config.load import dump, load_recipe
    from dtrain.core.files import write_atomic
    from dtrain.launching.commands import run_dir_of, with_run_dir
    from dtrain.launching.preflight import check_allocation
    from dtrain.launching.slurm import current_allocation

    settings = load_recipe(recipe, overrides or [])
    run, allocation = run_dir_of(settings), current_allocation(os.environ)
    write_atomic(run.submitted_recipe, dump(with_run_dir(settings, run)))
    if check_allocation(settings, run.submitted_recipe, run.slurm, allocation):
        raise typer.Exit(Exit.CRASHED)
