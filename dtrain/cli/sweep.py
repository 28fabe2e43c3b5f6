"""`dtrain sweep`: many runs of one recipe, to find its best settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain.cli.arguments import Overrides, Price
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import Exit, UserError

if TYPE_CHECKING:
    from dtrain.config.schema import Recipe
    from dtrain.config.sweep import Sweep
    from dtrain.planning.workload import Cluster
    from dtrain.sweep.driver import Runs
    from dtrain.sweep.record import SweepDir

Address = Annotated[
    str, typer.Argument(metavar="SWEEP|RECIPE", help="A sweep file, or a recipe to vary.")
]
Grid = Annotated[
    list[str] | None, typer.Option(metavar="KEY=A,B,…", help="Values of a key; may be repeated.")
]
Sample = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=RANGE",
        help="log(1e-5,1e-3), uniform(0,0.1) or int(1,8) of a key; may be repeated.",
    ),
]
Method = Annotated[str | None, typer.Option(help="grid, random or tpe.")]
Prune = Annotated[str | None, typer.Option(help="off, median or hyperband.")]
Trials = Annotated[int | None, typer.Option(min=1, help="Number of trials.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Runs of each trial, with other seeds.")]
AtOnce = Annotated[int | None, typer.Option(min=1, help="Runs at the same time.")]
MaxHours = Annotated[float | None, typer.Option(help="No run starts after so many hours.")]
MaxGpuHours = Annotated[float | None, typer.Option(help="No run starts after so many GPU-hours.")]
Folder = Annotated[str | None, typer.Option(help="The sweep's folder; default: runs/sweep.")]
UseSlurm = Annotated[bool, typer.Option("--slurm", help="Run the trials as jobs of Slurm.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Slurm: nodes of a trial.")]
Gpus = Annotated[int | None, typer.Option(min=0, help="Slurm: GPUs of each node.")]
Minutes = Annotated[int | None, typer.Option(min=1, help="Slurm: time limit of a trial's job.")]
Partition = Annotated[str | None, typer.Option(help="Slurm: as sbatch takes it.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and its cost; run nothing.")
]
GpuName = Annotated[
    str, typer.Option(envvar="DTRAIN_GPU", help="Kind of GPU, for the plan of --dry-run.")
]


def sweep(
    address: Address,
    overrides: Overrides = None,
    grid: Grid = None,
    sample: Sample = None,
    search: Method = None,
    prune: Prune = None,
    trials: Trials = None,
    seeds: Seeds = None,
    at_once: AtOnce = None,
    max_hours: MaxHours = None,
    max_gpu_hours: MaxGpuHours = None,
    folder: Folder = None,
    slurm: UseSlurm = False,
    nodes: Nodes = None,
    gpus: Gpus = None,
    minutes: Minutes = None,
    partition: Partition = None,
    dry_run: DryRun = False,
    gpu: GpuName = "h100-80g",
    price: Price = None,
) -> None:
    """Search a recipe's settings for the lowest loss; run it again to continue."""
    from dtrain.config.sweep import load_sweep, parse_option
    from dtrain.pipeline.input_checks import check_inputs

    parameters = [parse_option(text, is_list=True) for text in grid or []]
    parameters += [parse_option(text, is_list=False) for text in sample or []]
    keys = {
        "search": search,
        "prune": prune,
        "trials": trials,
        "seeds": seeds,
        "at_once": at_once,
        "max_hours": max_hours,
        "max_gpu_hours": max_gpu_hours,
        "folder": folder,
    }
    jobs = {"nodes": nodes, "gpus": gpus, "minutes": minutes, "partition": partition}
    options: dict[str, Any] = {k: v for k, v in keys.items() if v is not None}
    job_options = {k: v for k, v in jobs.items() if v is not None}
    if slurm or job_options:
        options["slurm"] = job_options
    settings = load_sweep(address, options | {"parameters": dict(parameters)}, overrides or [])
    check_inputs(settings.recipe_of({})).raise_errors()
    run_sweep(settings, dry_run=dry_run, gpu=gpu, price=price)


def run_sweep(settings: Sweep, *, dry_run: bool, gpu: str, price: float | None) -> None:
    """Plan a sweep, and work on it unless this is a dry run."""
    try:
        from dtrain.sweep.cost import draw_recipes, plan_lines
    except ImportError as error:
        fix = "pip install 'dtrain[sweep]'"
        raise UserError(f"a sweep needs {error.name}", fix=fix) from error
    from dtrain.core.locks import FolderLock
    from dtrain.sweep.driver import Driver
    from dtrain.sweep.page import write_page
    from dtrain.sweep.recipes import TrialRecipes
    from dtrain.sweep.record import SweepDir, open_record
    from dtrain.sweep.results import summary, write_best

    folder = SweepDir(user_path(settings.folder).absolute())
    recipes = TrialRecipes(settings, folder)
    record = open_record(folder, settings, recipes.base)
    if dry_run:
        cluster = cluster_of(settings, recipes.base, gpu)
        for line in plan_lines(settings, recipes, record, cluster, price):
            print(line)
        return
    draw_recipes(settings, recipes)  # wrong combinations are refused before the first trial
    runs = runs_of(settings, folder, recipes.base)
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder.path)
    if not lock.acquire():
        message = f"another process works on this sweep ({lock.holder()})"
        raise UserError(
            message, where=str(folder.path), fix="wait for it, or choose another --folder"
        )
    record = open_record(folder, settings, recipes.base)
    has_finished = Driver(settings, folder, recipes, record, runs).run()
    write_best(record, folder, recipes)
    write_page(record, folder)
    print(summary(record, folder))
    if not has_finished:
        print("interrupted; the same command continues", file=sys.stderr)
        raise typer.Exit(Exit.INTERRUPTED)
    if record.best is None:
        fix = "see the reasons above, and the logs in its folder logs"
        raise UserError("no trial is complete", where=str(folder.path), fix=fix)


def runs_of(settings: Sweep, folder: SweepDir, base: Recipe) -> Runs:
    """Processes of this machine, or jobs of Slurm."""
    from dtrain.sweep.local_runs import LocalRuns
    from dtrain.sweep.slurm_runs import SlurmRuns

    if settings.slurm is None:
        return LocalRuns(folder, base, settings.at_once)
    has_budget = settings.max_hours is not None or settings.max_gpu_hours is not None
    is_bounded = has_budget or settings.method == "tpe" or settings.seeds > 1
    return SlurmRuns(folder, settings.slurm, settings.at_once, is_bounded=is_bounded)


def cluster_of(settings: Sweep, base: Recipe, gpu: str) -> Cluster | None:
    """The GPUs of each run, for the plan; None for a recipe that trains on CPUs."""
    from dtrain.core.hardware import gpus
    from dtrain.planning.gpus import find_gpu
    from dtrain.planning.workload import Cluster

    if base.device == "cpu":
        return None
    if settings.slurm is not None:
        nodes, on_node = settings.slurm.nodes, settings.slurm.gpus
    else:
        nodes, on_node = 1, max(1, len(gpus() or range(8)) // settings.at_once)
    return Cluster(find_gpu(gpu), nodes, base.launch.ranks_on_node(on_node))
