"""A job that cannot fit is refused, unless somebody insists: on the login node, and at its head."""

from __future__ import annotations

from collections.abc import Callable

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.units import size
from dtrain.planning.bases import find_shape
from dtrain.planning.plan import Plan, StagePlan, make_plan
from dtrain.planning.setup import Cluster
from dtrain.planning.verdict import DOES_NOT_FIT


def planned(recipe: Recipe, cluster: Cluster, say: Callable[[str], None]) -> Plan | None:
    """The plan; None for a base whose shape the plan does not know, which is said.

    Raises:
        UserError: the recipe cannot run on so many ranks.
    """
    try:
        find_shape(recipe.model.base)
    except UserError as error:
        say(f"not planned: {error.what}")
        return None
    return make_plan(recipe, cluster)


def refuse_what_cannot_fit(plan: Plan, insist: str) -> None:
    """Raise where a stage needs more than the GPUs have.

    Args:
        insist: what a person adds who wants it all the same.

    Raises:
        UserError: it does not fit; with what would.
    """
    if plan.word != DOES_NOT_FIT:
        return
    stage = next(x for x in plan.stages if x.verdict.word == DOES_NOT_FIT)
    ways = [" ".join(change.texts) for change in stage.changes]
    raise UserError(
        f"{DOES_NOT_FIT} on {plan.cluster.gpu.name}: {_least(stage)}",
        where=f"stage {stage.name}",
        fix="; or ".join([*ways, insist]),
    )


def _least(stage: StagePlan) -> str:
    return f"at least {size(stage.verdict.lower)} of {size(stage.verdict.usable)}"
