"""A job that cannot fit is refused, unless somebody insists: on the login node, and at its head."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.nvidia import gpus
from dtrain.core.units import size
from dtrain.planning.fit import DOES_NOT_FIT
from dtrain.planning.gpus import Gpu, find_gpu, gpu_of_device
from dtrain.planning.known_models import check_trainable, find_shape
from dtrain.planning.plan import RecipePlan, StagePlan, make_plan
from dtrain.planning.render import lines_of
from dtrain.planning.workload import Cluster


def planned(recipe: Recipe, cluster: Cluster, say: Callable[[str], None]) -> RecipePlan | None:
    """The plan; None for a base whose shape the plan does not know, which is said.

    Raises:
        UserError: the recipe cannot run on so many ranks.
    """
    try:
        find_shape(recipe.model.base)
    except UserError as error:
        say(f"not planned: {error.message}")
        return None
    return make_plan(recipe, cluster)


def check_plan_fits(plan: RecipePlan, insist: str) -> None:
    """Raise where a stage needs more than the GPUs have.

    Args:
        insist: what a person adds who wants it all the same.

    Raises:
        UserError: it does not fit; with what would.
    """
    if plan.verdict != DOES_NOT_FIT:
        return
    stage = next(x for x in plan.stages if x.fit.verdict == DOES_NOT_FIT)
    ways = [" ".join(change.settings) for change in stage.changes]
    raise UserError(
        f"{DOES_NOT_FIT} on {plan.cluster.gpu.name}: {_least(stage)}",
        where=f"stage {stage.name}",
        fix="; or ".join([*ways, insist]),
    )


def _least(stage: StagePlan) -> str:
    return f"at least {size(stage.fit.lower)} of {size(stage.fit.usable)}"


COLUMNS = 100
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    """Plan; return 0 unless the job cannot fit, or its recipe is wrong."""
    address, *overrides = sys.argv[1:] if argv is None else argv
    try:
        recipe = load_recipe(address, overrides)
        check_trainable(recipe.model.base)
        head_of_job(recipe, os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return Exit.FINISHED


def head_of_job(recipe: Recipe, environ: Mapping[str, str]) -> None:
    """Print the plan, whole at a job's first start; nothing where it runs on CPUs.

    Raises:
        UserError: it does not fit, and nobody insists.
    """
    cluster = None if recipe.device == "cpu" else cluster_of_job(recipe, environ)
    plan = planned(recipe, cluster, say) if cluster else None
    if plan is None:
        return
    lines = lines_of(plan, COLUMNS)
    for line in [next(lines)] if environ.get("SLURM_RESTART_COUNT", "0") != "0" else lines:
        say(line)
    if environ.get("DTRAIN_FORCE") != "1":
        check_plan_fits(plan, "DTRAIN_FORCE=1")


def say(line: str) -> None:
    """A line of the job's log."""
    print(line, file=sys.stderr)


def cluster_of_job(recipe: Recipe, environ: Mapping[str, str]) -> Cluster | None:
    """The job's nodes as this one is; None if it has no GPUs."""
    told = [one for one in gpus() or [] if one.get("memory.total", "").isdecimal()]
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    count = int(given) if given.isdecimal() else len(told)
    kind = _kind(told, environ) if count else None
    if kind is None:
        return None
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
    return Cluster(kind, nodes, recipe.launch.ranks_on_node(count))


def _kind(told: list[dict[str, str]], environ: Mapping[str, str]) -> Gpu | None:
    """The smallest GPU of the node; by DTRAIN_GPU where its driver says nothing."""
    if told:
        least = min(told, key=lambda one: int(one["memory.total"]))
        return gpu_of_device(least["name"], int(least["memory.total"]) * MIB)
    name = environ.get("DTRAIN_GPU")
    return find_gpu(name) if name else None


if __name__ == "__main__":
    sys.exit(main())
