"""The plan of a recipe on a cluster, stage by stage: memory, speed, disk and suggestions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

from dtrain.config.schema import Recipe, Stage
from dtrain.core.coded_tensors import file_tensors
from dtrain.core.errors import UserError
from dtrain.planning.architectures import check_not_quantized, read_config
from dtrain.planning.build_workload import build_workload
from dtrain.planning.calibration import Correction, find_correction
from dtrain.planning.choose import PlanOption, list_options, resolve
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.fit import FITS, ORDER, MemoryFit, Suggestion, assess_fit, suggest_changes
from dtrain.planning.known_models import find_config, find_shape
from dtrain.planning.memory_estimate import MemoryEstimate
from dtrain.planning.shapes import ModelShape, check_stored
from dtrain.planning.simulated_peak import (
    ReportProgress,
    SimulatedStep,
    progress_units,
    simulate_step,
)
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
from dtrain.planning.wall_time import WallTime, forward_passes, not_timed, stage_wall_time
from dtrain.planning.workload import Cluster, Workload

ProgressBar = Callable[[str, int], AbstractContextManager[ReportProgress]]
"""Opens a progress bar with a title and a number of units."""


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        received: bytes that a rank receives in an optimizer step.
        entering: bytes that enter a node in an optimizer step.
        suggestions: changes that would make it fit, cheapest first; empty if it fits.
        speed: tokens a second of all ranks.
        tokens: None where their number is not known.
        time: hours, by what they are spent on.
        minutes_before: of the training, before the first step.
        disk: bytes.
        caveats: why the figures may be wrong.
        correction: from earlier runs on this machine, if there were any.
        simulated: a simulated step, if one was requested.
    """

    name: str
    workload: Workload
    memory: MemoryEstimate
    fit: MemoryFit
    received: float
    entering: float
    suggestions: list[Suggestion]
    speed: Estimate
    tokens: TokenCount | None
    time: WallTime
    minutes_before: float
    disk: float
    caveats: list[str]
    correction: Correction | None
    simulated: SimulatedStep | None = None


@dataclass(frozen=True)
class RecipePlan:
    """The plan of a recipe on a cluster.

    Attributes:
        not_timed: what the hours leave out.
    """

    name: str
    base: str
    shape: ModelShape
    shape_source: str
    cluster: Cluster
    stages: list[StagePlan]
    options: list[PlanOption]
    not_timed: list[str]

    @property
    def largest(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.fit.budget)

    @property
    def hours(self) -> Estimate | None:
        """Hours of the whole chain; None if the tokens of a stage are not known."""
        totals = [stage.time.total for stage in self.stages]
        known = [total for total in totals if total is not None]
        if len(known) < len(totals):
            return None
        return reduce(Estimate.plus, known)

    @property
    def gpu_hours(self) -> Estimate | None:
        """`hours` on all GPUs."""
        return self.hours.times(self.cluster.ranks) if self.hours else None

    @property
    def verdict(self) -> str:
        """The worst verdict of all stages."""
        return max((stage.fit.verdict for stage in self.stages), key=ORDER.index)


def simulate_plan(plan: RecipePlan, recipe: Recipe, bar: ProgressBar) -> RecipePlan:
    """The plan with a simulated step of every stage.

    Args:
        recipe: the recipe that `make_plan` planned.

    Raises:
        UserError: a stage cannot be simulated.
    """
    recipe, config = resolve(recipe, plan.cluster), find_config(recipe.model.base)[0]
    stages = []
    for stage in plan.stages:
        with bar(f"simulating {stage.name}", progress_units(stage.workload)) as report:
            step = simulate_step(recipe, stage.name, stage.workload, config, report)
        stages.append(replace(stage, simulated=step))
    return replace(plan, stages=stages)


def make_plan(recipe: Recipe, cluster: Cluster) -> RecipePlan:
    """Plan every stage, after choosing what the recipe leaves to `auto`.

    Raises:
        UserError: the base's shape is not known, or not that of its files; or the ranks cannot
            share a batch evenly.
    """
    shape, source = find_shape(recipe.model.base)
    _check_files(shape, source)
    recipe = resolve(recipe, cluster)
    stages = [_plan_stage(recipe, stage, shape, cluster) for stage in recipe.stages]
    plan = RecipePlan(
        recipe.name, recipe.model.base, shape, source, cluster, stages, [], not_timed(recipe)
    )
    return replace(plan, options=list_options(plan.largest.workload, cluster))


def _check_files(shape: ModelShape, source: str) -> None:
    """Check a base's shape with its files, if they are here: `dtrain check` looks for them."""
    path = Path(source)
    if path.is_file() and (shapes := _stored_shapes(path, path.parent.stat().st_mtime_ns)):
        check_stored(shape, shapes, source)


@lru_cache
def _stored_shapes(config: Path, changed_ns: int) -> list[list[int]]:
    """The shapes in a model's files; empty if they are not read, such as those of 4-bit weights."""
    with suppress(UserError):
        check_not_quantized(read_config(config), str(config))
        return [tensor.shape for tensor in file_tensors(config.parent).values()]
    return []


def _plan_stage(recipe: Recipe, stage: Stage, shape: ModelShape, cluster: Cluster) -> StagePlan:
    workload = build_workload(recipe, stage, shape, cluster)
    model = build_engine_model(workload)
    memory, fit = model.peak_memory(), assess_fit(workload, cluster)
    correction = find_correction(
        cluster.gpu.name, workload.engine, workload.method.kind, memory.peak
    )
    speed = tokens_per_second(workload, cluster)
    if correction:
        speed = speed.times(correction.speed_ratio)
    tokens = stage_tokens(stage)
    before = tokens_before(stage, workload, tokens)
    hours = _hours(tokens, speed, before)
    return StagePlan(
        name=stage.name,
        workload=workload,
        memory=memory,
        fit=fit,
        received=model.received_bytes(),
        entering=model.entering_bytes(),
        suggestions=[] if fit.verdict == FITS else suggest_changes(workload, cluster),
        speed=speed,
        tokens=tokens,
        time=stage_wall_time(recipe, stage, workload, speed, tokens, hours),
        minutes_before=before / speed.middle / 60,
        disk=disk_bytes(recipe, stage, workload),
        caveats=[] if correction else list_caveats(workload, cluster),
        correction=correction,
    )


def tokens_before(stage: Stage, workload: Workload, tokens: TokenCount | None) -> float:
    """What is computed before the first step, as tokens that take as long in training."""
    term = stage.regularize
    before = float(term.sequences_before * stage.data.sequence_length if term else 0)
    if workload.traits.trains_base:  # every rank computes all of these sequences
        before *= workload.ranks
    if stage.stores_reference and tokens:  # one forward pass of what the stage trains on
        epochs = max(1.0, stage.train.epochs or 1.0)
        before += tokens.tokens / epochs / forward_passes(workload)
    return before


def _hours(count: TokenCount | None, speed: Estimate, before: float) -> Estimate | None:
    if count is None:
        return None
    rates = (speed.high, speed.middle, speed.low)
    return Estimate(*((before + count.tokens) / rate / 3600 for rate in rates))


def list_caveats(workload: Workload, cluster: Cluster) -> list[str]:
    """Why the figures of a plan may be wrong."""
    caveats = []
    if workload.shape.outer:
        kind = workload.shape.kind
        caveats.append(f"the activations of {kind} are an estimate from the layers that it has")
    if workload.offload:
        caveats.append("no published figures confirm the memory of offloading")
    if workload.distills:
        caveats.append("no published figures confirm the memory of a divergence from another model")
    if added := workload.method.added_tokens:
        caveats.append(f"each packed document has {added} virtual tokens; those of one are counted")
    if workload.stores_teacher:
        caveats.append("the hours leave out the teacher's forward pass before the training")
    if workload.shape.soft_cap:
        caveats.append("attention with capped scores needs memory quadratic in sequence length")
    if not has_published_speed(cluster.gpu):
        caveats.append(f"there is no published speed of {cluster.gpu.name}")
    if cluster.nodes > 1:
        caveats.append("speed between nodes depends on a network that the plan does not know")
    if is_communication_bound(workload, cluster):
        caveats.append("communication takes longer than computing, so speed depends on the links")
    return caveats


def as_json(plan: RecipePlan, price: float | None = None) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds and hours as numbers.

    Args:
        price: of an hour of one GPU, in any currency.
    """
    cost = plan.gpu_hours.times(price) if plan.gpu_hours and price is not None else None
    return {
        "recipe": plan.name,
        "base": plan.base,
        "shape_source": plan.shape_source,
        "parameters": plan.shape.parameters,
        "gpu": plan.cluster.gpu.name,
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "verdict": plan.verdict,
        "hours": asdict(plan.hours) if plan.hours else None,
        "gpu_hours": asdict(plan.gpu_hours) if plan.gpu_hours else None,
        "cost": asdict(cost) if cost else None,
        "stages": [_stage_json(stage) for stage in plan.stages],
        "options": [_option_json(option) for option in plan.options],
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    workload, fit = stage.workload, stage.fit
    return {
        "name": stage.name,
        **_settings_json(workload),
        "trainable": workload.trainable,
        "memory": stage.memory.terms() | {"peak": stage.memory.peak, "moment": stage.memory.moment},
        "lower": fit.lower,
        "budget": fit.budget,
        "usable": fit.usable,
        "verdict": fit.verdict,
        "changes": [{"change": list(x.settings), "cost": x.cost} for x in stage.suggestions],
        "host_load": host_load_bytes(workload),
        "host_save": host_save_bytes(workload),
        "host_merge": host_merge_bytes(workload),
        "checkpoint": checkpoint_bytes(workload),
        "disk": stage.disk,
        "received_per_step": stage.received,
        "entering_node_per_step": stage.entering,
        "tokens_per_second": asdict(stage.speed),
        "tokens": stage.tokens.tokens if stage.tokens else None,
        "tokens_exact": bool(stage.tokens and stage.tokens.is_exact),
        "hours": asdict(stage.time.training) if stage.time.training else None,
        "hours_beside_training": {
            "load": stage.time.load,
            "evaluation": stage.time.evaluation,
            "saves": stage.time.saves,
            "merge": stage.time.merge,
        },
        "hours_in_all": asdict(stage.time.total) if stage.time.total else None,
        "minutes_before": stage.minutes_before,
        "caveats": stage.caveats,
        "correction": asdict(stage.correction) if stage.correction else None,
        "simulated": asdict(stage.simulated) if stage.simulated else None,
    }


def _settings_json(workload: Workload) -> dict[str, Any]:
    return {
        "engine": workload.engine,
        "shard": workload.shard,
        "method": workload.method.kind,
        "micro_batch_size": workload.micro_batch,
        "gradient_checkpointing": workload.checkpointing,
        "offload": workload.offload,
    }


def _option_json(option: PlanOption) -> dict[str, Any]:
    return _settings_json(option.workload) | {
        "budget": option.fit.budget,
        "verdict": option.fit.verdict,
        "tokens_per_second": option.speed,
        "reason": option.reason,
    }
