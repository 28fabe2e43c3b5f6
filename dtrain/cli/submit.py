"""`dtrain submit`: check, then a job of Slurm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress
from dtrain.cli.run import placed
from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.units import size

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
Force = Annotated[bool, typer.Option("--force", help="Submit what does not fit by the plan.")]
Prepare = Annotated[
    bool, typer.Option("--prepare", help="Tokenise and pack in a job without GPUs before it.")
]
Preflight = Annotated[
    str, typer.Option(help="on, off, or exclude: submit anew without the nodes at fault.")
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
    from dtrain.launching import submit as jobs

    settings = load_recipe(recipe, overrides or [])
    folder = Path(settings.output.folder).expanduser().absolute()
    settings, working = placed(settings, folder), Path.cwd()
    if gpus and settings.device != "cpu":
        refuse_what_cannot_fit(settings, gpu, nodes, gpus, force)
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
    )
    if dry_run:
        if prepare:
            print(jobs.preparation(settings, resources, working).tell())
        print(jobs.training(settings, resources, working).tell())
        return
    numbers = jobs.submit(settings, resources, working, prepare)
    print(f"submitted job {' and then '.join(numbers)}; next:")
    for verb in ("status", "logs -f", "cancel"):
        print(f"  dtrain {verb} {jobs.quote(folder)}")


def refuse_what_cannot_fit(
    recipe: Recipe, gpu: str | None, nodes: int, gpus: int, force: bool
) -> None:
    """Plan the recipe on the job's GPUs; without their name on the largest that the plan knows.

    A base whose shape the plan does not know is not refused.

    Raises:
        UserError: it does not fit, and nobody insists; the GPU is not known; or the recipe
            cannot run on so many ranks.
    """
    from dtrain.planning.bases import find_shape
    from dtrain.planning.gpus import GPUS, find_gpu
    from dtrain.planning.plan import make_plan
    from dtrain.planning.setup import Cluster
    from dtrain.planning.verdict import DOES_NOT_FIT

    kind = find_gpu(gpu) if gpu else max(GPUS.values(), key=lambda one: one.memory_gib)
    try:
        find_shape(recipe.model.base)
    except UserError as error:
        print(f"not planned: {error.what}", file=sys.stderr)
        return
    on_node = recipe.launch.ranks_on_node(gpus)
    stage = make_plan(recipe, Cluster(kind, nodes, on_node)).worst
    verdict = stage.verdict
    if verdict.word != DOES_NOT_FIT or force:
        told = f"on {kind.name}" if gpu else "on the largest GPUs; --gpu NAME asks about yours"
        print(f"plan: {verdict.word} {told}", file=sys.stderr)
        return
    what = (
        f"{DOES_NOT_FIT} on {kind.name}: at least {size(verdict.lower)} of {size(verdict.usable)}"
    )
    ways = [" ".join(change.texts) for change in stage.changes]
    fix = "; or ".join([*ways, "--force"])
    raise UserError(what, where=f"stage {stage.name}", fix=fix)
