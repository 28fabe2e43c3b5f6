"""`dtrain plan`: a recipe on a cluster, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from dtrain.config.schema import Recipe, Stage
from dtrain.planning.calibration import Measured, measured
from dtrain.planning.choose import Option, options, resolved
from dtrain.planning.communication import entering_bytes, received_bytes
from dtrain.planning.fit import FITS, ORDER, Change, Verdict, advice, verdict_of
from dtrain.planning.known_models import find_config, find_shape
from dtrain.planning.memory import Memory, memory_of
from dtrain.planning.shapes import Shape
from dtrain.planning.simulated_peak import Exact, Told, simulate, steps_of
from dtrain.planning.speed import Range, is_measured, tokens_per_second, waits_for_links
from dtrain.planning.storage import (
    Amount,
    checkpoint_bytes,
    disk_bytes,
    host_load_bytes,
    host_merge_bytes,
    host_save_bytes,
    stage_tokens,
)
from dtrain.planning.workload import Cluster, Setup, setup_of

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
    setup: Setup
    memory: Memory
    verdict: Verdict
    changes: list[Change]
    speed: Range
    amount: Amount | None
    hours: Range | None
    disk: float
    doubts: list[str]
    measured: Measured | None
    exact: Exact | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster."""

    name: str
    base: str
    shape: Shape
    shape_source: str
    cluster: Cluster
    stages: list[StagePlan]
    options: list[Option]

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.verdict.budget)

    @property
    def word(self) -> str:
        """The verdict on the whole recipe."""
        return max((stage.verdict.word for stage in self.stages), key=ORDER.index)


def with_exact(plan: Plan, recipe: Recipe, meter: Meter) -> Plan:
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
        with meter(f"simulating {stage.name}", steps_of(stage.setup)) as told:
            found = simulate(recipe, stage.name, stage.setup, plan.cluster, config, told)
        stages.append(replace(stage, exact=found))
    return replace(plan, stages=stages)


def make_plan(recipe: Recipe, cluster: Cluster) -> Plan:
    """Plan every stage; what the recipe leaves to choose is chosen first.

    Raises:
        UserError: the base's shape is not known, or a batch cannot be shared among the ranks.
    """
    shape, source = find_shape(recipe.model.base)
    recipe = resolved(recipe, cluster)
    last = recipe.stages[-1].name
    stages = [
        _plan_stage(
            recipe, stage, setup_of(recipe, stage, shape, cluster), cluster, stage.name == last
        )
        for stage in recipe.stages
    ]
    plan = Plan(recipe.name, recipe.model.base, shape, source, cluster, stages, [])
    return replace(plan, options=options(plan.worst.setup, cluster))


def _plan_stage(
    recipe: Recipe, stage: Stage, setup: Setup, cluster: Cluster, is_last: bool
) -> StagePlan:
    memory = memory_of(setup)
    known = measured(cluster.gpu.name, setup.engine, setup.method, memory.peak)
    verdict = verdict_of(setup, cluster)
    speed = tokens_per_second(setup, cluster)
    if known:
        speed = speed.times(known.speed_ratio)
    amount = stage_tokens(stage)
    return StagePlan(
        name=stage.name,
        setup=setup,
        memory=memory,
        verdict=verdict,
        changes=[] if verdict.word == FITS else advice(setup, cluster),
        speed=speed,
        amount=amount,
        hours=_hours(amount, speed),
        disk=disk_bytes(recipe, stage, setup, is_last=is_last),
        doubts=[] if known else doubts(setup, cluster),
        measured=known,
    )


def _hours(amount: Amount | None, speed: Range) -> Range | None:
    if amount is None:
        return None
    low, middle, high = (
        amount.tokens / rate / 3600 for rate in (speed.high, speed.middle, speed.low)
    )
    return Range(low, middle, high)


def doubts(setup: Setup, cluster: Cluster) -> list[str]:
    """Where the plan is not to be trusted."""
    found = []
    if setup.offload:
        found.append("memory with offload could not be predicted from published figures")
    if setup.shape.soft_cap:
        found.append("attention with capped scores takes memory that grows with the square")
    if not is_measured(cluster.gpu):
        found.append(f"no published speed of {cluster.gpu.name} was at hand")
    if cluster.nodes > 1:
        found.append("speed between nodes depends on a network that the plan does not know")
    if waits_for_links(setup, cluster):
        found.append("sending takes longer than computing, so the links decide how long it takes")
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds, no units inside texts."""
    return {
        "recipe": plan.name,
        "base": plan.base,
        "shape_source": plan.shape_source,
        "parameters": plan.shape.parameters,
        "gpu": plan.cluster.gpu.name,
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "verdict": plan.word,
        "stages": [_stage_json(stage) for stage in plan.stages],
        "options": [_option_json(option) for option in plan.options],
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    setup, verdict = stage.setup, stage.verdict
    return {
        "name": stage.name,
        **_way(setup),
        "trainable": setup.trainable,
        "memory": stage.memory.terms() | {"peak": stage.memory.peak, "moment": stage.memory.moment},
        "lower": verdict.lower,
        "budget": verdict.budget,
        "usable": verdict.usable,
        "verdict": verdict.word,
        "changes": [{"change": list(x.texts), "cost": x.cost} for x in stage.changes],
        "host_load": host_load_bytes(setup),
        "host_save": host_save_bytes(setup),
        "host_merge": host_merge_bytes(setup),
        "checkpoint": checkpoint_bytes(setup),
        "disk": stage.disk,
        "received_per_step": received_bytes(setup),
        "entering_node_per_step": entering_bytes(setup),
        "tokens_per_second": asdict(stage.speed),
        "tokens": stage.amount.tokens if stage.amount else None,
        "tokens_exact": bool(stage.amount and stage.amount.is_exact),
        "hours": asdict(stage.hours) if stage.hours else None,
        "low_confidence": stage.doubts,
        "measured": asdict(stage.measured) if stage.measured else None,
        "exact": asdict(stage.exact) if stage.exact else None,
    }


def _way(setup: Setup) -> dict[str, Any]:
    return {
        "engine": setup.engine,
        "shard": setup.shard,
        "method": setup.method,
        "micro_batch_size": setup.micro_batch,
        "gradient_checkpointing": setup.checkpointing,
        "offload": setup.offload,
    }


def _option_json(option: Option) -> dict[str, Any]:
    return _way(option.setup) | {
        "budget": option.verdict.budget,
        "verdict": option.verdict.word,
        "tokens_per_second": option.speed,
        "reason": option.reason,
    }
