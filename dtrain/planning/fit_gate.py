"""Stops a job that cannot fit: before it is submitted, and again when it starts on its GPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.hardware import gpus
from dtrain.core.units import size
from dtrain.planning.fit import DOES_NOT_FIT
from dtrain.planning.gpus import Gpu, find_gpu, gpu_of_device
from dtrain.planning.known_models import find_shape
from dtrain.planning.plan import RecipePlan, make_plan
from dtrain.planning.render import render_plan
from dtrain.planning.workload import Cluster

COLUMNS = 100
MIB = 2**20


def plan_known_base(
    recipe: Recipe, cluster: Cluster, say: Callable[[str], None]
) -> RecipePlan | None:
    """The plan, or None with a message for a base whose shape the plan does not know.

    Raises:
        UserError: the recipe cannot run on the cluster's ranks.
    """
    try:
        find_shape(recipe.model.base)
    except UserError as error:
        say(f"not planned: {error.message}")
        return None
    return make_plan(recipe, cluster)


def check_plan_fits(plan: RecipePlan, override: str) -> None:
    """Check that every stage can fit.

    Args:
        override: what a person adds to run it in spite of the plan.

    Raises:
        UserError: a stage does not fit; the message says which changes would help.
    """
    if plan.verdict != DOES_NOT_FIT:
        return
    stage = next(x for x in plan.stages if x.fit.verdict == DOES_NOT_FIT)
    needed = f"at least {size(stage.fit.lower)} of {size(stage.fit.usable)}"
    changes = [change.arguments(stage.name) for change in stage.suggestions]
    raise UserError(
        f"{DOES_NOT_FIT} on {plan.cluster.gpu.name}: {needed}",
        where=f"stage {stage.name}",
        fix="; or ".join([*changes, override]),
    )


def check_job(recipe: Recipe, environ: Mapping[str, str]) -> None:
    """Print the plan for the GPUs of this job, and check that it fits.

    A requeued job prints only the first line. A job on CPUs prints nothing.

    Raises:
        UserError: it does not fit, and DTRAIN_FORCE is not 1.
    """
    cluster = None if recipe.device == "cpu" else cluster_of_job(recipe, environ)
    plan = plan_known_base(recipe, cluster, _log) if cluster else None
    if plan is None:
        return
    lines = render_plan(plan, COLUMNS)
    is_requeued = environ.get("SLURM_RESTART_COUNT", "0") != "0"
    for line in [next(lines)] if is_requeued else lines:
        _log(line)
    if environ.get("DTRAIN_FORCE") != "1":
        check_plan_fits(plan, "DTRAIN_FORCE=1")


def _log(line: str) -> None:
    print(line, file=sys.stderr)


def cluster_of_job(recipe: Recipe, environ: Mapping[str, str]) -> Cluster | None:
    """The job's nodes, taken to be like this one; None without GPUs."""
    rows = [row for row in gpus() or [] if row.get("memory.total", "").isdecimal()]
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    count = int(on_node) if on_node.isdecimal() else len(rows)
    gpu = _smallest_gpu(rows, environ) if count else None
    if gpu is None:
        return None
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
    return Cluster(gpu, nodes, recipe.launch.ranks_on_node(count))


def _smallest_gpu(rows: list[dict[str, str]], environ: Mapping[str, str]) -> Gpu | None:
    """The node's GPU with least memory; DTRAIN_GPU names it where the driver lists none.

    Args:
        rows: one dictionary a GPU, as nvidia-smi reports it.
    """
    if rows:
        least = min(rows, key=lambda row: int(row["memory.total"]))
        return gpu_of_device(least["name"], int(least["memory.total"]) * MIB)
    name = environ.get("DTRAIN_GPU")
    return find_gpu(name) if name else None
