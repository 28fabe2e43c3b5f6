"""The plan at the head of a job, for slurm/job.sh: `… planning.job RECIPE [key=value …]`.

It is for the GPUs that the node really has, and ends a job that cannot fit before any rank starts.
DTRAIN_FORCE=1 lets such a job go on, as `dtrain submit --force` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.nvidia import gpus
from dtrain.planning.bases import refuse_untrainable
from dtrain.planning.gpus import Gpu, find_gpu, gpu_of_device
from dtrain.planning.refuse import planned, refuse_what_cannot_fit
from dtrain.planning.setup import Cluster
from dtrain.planning.show import lines_of

COLUMNS = 100
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    """Plan; return 0 unless the job cannot fit, or its recipe is wrong."""
    address, *overrides = sys.argv[1:] if argv is None else argv
    try:
        recipe = load_recipe(address, overrides)
        refuse_untrainable(recipe.model.base)
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
        refuse_what_cannot_fit(plan, "DTRAIN_FORCE=1")


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
