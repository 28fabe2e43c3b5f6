"""`dtrain plan`: a recipe on a cluster, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from dtrain.config.schema import Recipe, Stage
from dtrain.planning.calibration import Correction, measured
from dtrain.planning.choose import Option, options, resolved
from dtrain.planning.communication import entering_bytes, received_bytes
from dtrain.planning.fit import FITS, ORDER, MemoryFit, Suggestion, assess_fit, suggest_changes
from dtrain.planning.known_models import find_config, find_shape
from dtrain.planning.memory import MemoryEstimate, estimate_memory
from dtrain.planning.shapes import ModelShape
from dtrain.planning.simulated_peak import SimulationResult, Told, simulate, steps_of
from dtrain.planning.speed import (
    Estimate,
    has_published_speed,
    is_communication_bound,
    tokens_per_second,
)
from dtrain.planning.storage import (
    TokenCount,
    checkpoint_bytes,
    disk_bytes,
    host_load_bytes,
    host_merge_bytes,
    host_save_bytes,
    stage_tokens,
)
from dtrain.planning.workload import Cluster, Workload, build_workload

Meter = Callable[[str, int], AbstractContextManager[Told]]


@dataclass(frozen=True)
class StagePlan:
    """One stage of the chain.

    Attributes:
        changes: cheapest first; empty if it fits.
        hours: None where the number of tokens is not known.
        doubts: why the figures are not to be relied on, in words.
        measured: of earlier runs here, if there were any.
        exact: of a simulation, if one was asked for.
    """

    name: str
    workload: Workload
    memory: MemoryEstimate
    fit: MemoryFit
    changes: list[Suggestion]
    speed: Estimate
    amount: TokenCount | None
    hours: Estimate | None
    disk: float
    doubts: list[str]
    measured: Correction | None
    exact: SimulationResult | None = None


@dataclass(frozen=True)
class RecipePlan:
    """A recipe on a cluster."""

    name: str
    base: str
    shape: ModelShape
    shape_source: str
    cluster: Cluster
    stages: list[StagePlan]
    options: list[Option]

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.fit.budget)

    @property
    def verdict(self) -> str:
        """The verdict on the whole recipe."""
        return max((stage.fit.verdict for stage in self.stages), key=ORDER.index)


def with_exact(plan: RecipePlan, recipe: Recipe, meter: Meter) -> RecipePlan:
    """The plan with every stage simulated.

    Args:
        recipe: as `make_plan` had it.
        meter: makes a progress bar, of a title and a number of units.

    Raises:
        UserError: as `exact.simulate`.
    """
    recipe, config = resolved(recipe, plan.cluster), find_config(recipe.model.base)[0]
    stages = []
    for stage in plan.stages:
        with meter(f"simulating {stage.name}", steps_of(stage.workload)) as told:
            found = simulate(recipe, stage.name, stage.workload, plan.cluster, config, told)
        stages.append(replace(stage, exact=found))
    return replace(plan, stages=stages)


def make_plan(recipe: Recipe, cluster: Cluster) -> RecipePlan:
    """Plan every stage; what the recipe leaves to choose is chosen first.

    Raises:
        UserError: the base's shape is not known, or a batch cannot be shared among the ranks.
    """
    shape, source = find_shape(recipe.model.base)
    recipe = resolved(recipe, cluster)
    last = recipe.stages[-1].name
    stages = [
        _plan_stage(
            recipe,
            stage,
            build_workload(recipe, stage, shape, cluster),
            cluster,
            stage.name == last,
        )
        for stage in recipe.stages
    ]
    plan = RecipePlan(recipe.name, recipe.model.base, shape, source, cluster, stages, [])
    return replace(plan, options=options(plan.worst.workload, cluster))


def _plan_stage(
    recipe: Recipe, stage: Stage, workload: Workload, cluster: Cluster, is_last: bool
) -> StagePlan:
    memory = estimate_memory(workload)
    known = measured(cluster.gpu.name, workload.engine, workload.method, memory.peak)
    fit = assess_fit(workload, cluster)
    speed = tokens_per_second(workload, cluster)
    if known:
        speed = speed.times(known.speed_ratio)
    amount = stage_tokens(stage)
    return StagePlan(
        name=stage.name,
        workload=workload,
        memory=memory,
        fit=fit,
        changes=[] if fit.verdict == FITS else suggest_changes(workload, cluster),
        speed=speed,
        amount=amount,
        hours=_hours(amount, speed),
        disk=disk_bytes(recipe, stage, workload, is_last=is_last),
        doubts=[] if known else doubts(workload, cluster),
        measured=known,
    )


def _hours(amount: TokenCount | None, speed: Estimate) -> Estimate | None:
    if amount is None:
        return None
    low, middle, high = (
        amount.tokens / rate / 3600 for rate in (speed.high, speed.middle, speed.low)
    )
    return Estimate(low, middle, high)


def doubts(workload: Workload, cluster: Cluster) -> list[str]:
    """Where the plan is not to be trusted."""
    found = []
    if workload.offload:
        found.append("memory with offload could not be predicted from published figures")
    if workload.shape.soft_cap:
        found.append("attention with capped scores takes memory that grows with the square")
    if not has_published_speed(cluster.gpu):
        found.append(f"no published speed of {cluster.gpu.name} was at hand")
    if cluster.nodes > 1:
        found.append("speed between nodes depends on a network that the plan does not know")
    if is_communication_bound(workload, cluster):
        found.append("sending takes longer than computing, so the links decide how long it takes")
    return found


def as_json(plan: RecipePlan) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds, no units inside texts."""
    return {
        "recipe": plan.name,
        "base": plan.base,
        "shape_source": plan.shape_source,
        "parameters": plan.shape.parameters,
        "gpu": plan.cluster.gpu.name,
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "verdict": plan.verdict,
        "stages": [_stage_json(stage) for stage in plan.stages],
        "options": [_option_json(option) for option in plan.options],
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    workload, fit = stage.workload, stage.fit
    return {
        "name": stage.name,
        **_way(workload),
        "trainable": workload.trainable,
        "memory": stage.memory.terms() | {"peak": stage.memory.peak, "moment": stage.memory.moment},
        "lower": fit.lower,
        "budget": fit.budget,
        "usable": fit.usable,
        "verdict": fit.verdict,
        "changes": [{"change": list(x.settings), "cost": x.cost} for x in stage.changes],
        "host_load": host_load_bytes(workload),
        "host_save": host_save_bytes(workload),
        "host_merge": host_merge_bytes(workload),
        "checkpoint": checkpoint_bytes(workload),
        "disk": stage.disk,
        "received_per_step": received_bytes(workload),
        "entering_node_per_step": entering_bytes(workload),
        "tokens_per_second": asdict(stage.speed),
        "tokens": stage.amount.tokens if stage.amount else None,
        "tokens_exact": bool(stage.amount and stage.amount.is_exact),
        "hours": asdict(stage.hours) if stage.hours else None,
        "low_confidence": stage.doubts,
        "measured": asdict(stage.measured) if stage.measured else None,
        "exact": asdict(stage.exact) if stage.exact else None,
    }


def _way(workload: Workload) -> dict[str, Any]:
    return {
        "engine": workload.engine,
        "shard": workload.shard,
        "method": workload.method,
        "micro_batch_size": workload.micro_batch,
        "gradient_checkpointing": workload.checkpointing,
        "offload": workload.offload,
    }


def _option_json(option: Option) -> dict[str, Any]:
    return _way(option.workload) | {
        "budget": option.fit.budget,
        "verdict": option.fit.verdict,
        "tokens_per_second": option.speed,
        "reason": option.reason,
    }
