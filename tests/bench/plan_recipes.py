"""Simulates each stage of the shipped recipes on its cluster, and prints the plan next to it.

    python tests/bench/plan_recipes.py [RECIPE …]      # a minute or two a stage

Stages that `--exact` cannot simulate are listed with the plan's figure only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from dtrain.cli.recipes import no_progress
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.planning.gpus import find_gpu
from dtrain.planning.plan import StagePlan, make_plan, simulate_plan
from dtrain.planning.workload import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "planning"))

from test_plan_recipes import CLUSTER_OF

GB = 1e9


def lines_of(name: str) -> Iterator[str]:
    """One line for each stage."""
    gpu, nodes, gpus = CLUSTER_OF[name]
    recipe, cluster = load_recipe(name), Cluster(find_gpu(gpu), nodes, gpus)
    plan = make_plan(recipe, cluster)
    try:
        plan, why = simulate_plan(plan, recipe, no_progress), ""
    except UserError as error:
        why = error.message
    for stage in plan.stages:
        head = f"{name:<16}{stage.name:<8}{nodes} x {gpus} {gpu:<13}{stage.fit.verdict:<6}"
        yield f"{head}plan {stage.memory.peak / GB:6.2f}  {why or simulation_text(stage)}"


def simulation_text(stage: StagePlan) -> str:
    """The result of the simulation."""
    assert stage.simulated
    peak, planned = stage.simulated.peak, stage.memory.peak
    where = f"{stage.memory.moment} by plan, {peak.phase} ({peak.region}) by simulation"
    return f"simulated {peak.total / GB:6.2f} GB  {planned / peak.total - 1:+6.1%}  {where}"


def main() -> None:
    for name in sys.argv[1:] or CLUSTER_OF:
        for line in lines_of(name):
            print(line, flush=True)


if __name__ == "__main__":
    main()
