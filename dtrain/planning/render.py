"""The plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from textwrap import wrap

from dtrain.core.units import count, duration, size
from dtrain.planning.calibration import Correction
from dtrain.planning.fit import FITS
from dtrain.planning.plan import RecipePlan, StagePlan
from dtrain.planning.simulated_peak import SimulatedStep
from dtrain.planning.speed import Estimate
from dtrain.planning.storage import (
    checkpoint_bytes,
    host_load_bytes,
    host_merge_bytes,
    host_save_bytes,
)
from dtrain.planning.workload import Cluster, Workload

LABEL_COLUMNS = 15
MIN_SHARE = 0.002  # of a peak; smaller terms are not shown
MOMENTS = {
    "loading": "while the base is loaded",
    "teacher": "when the teacher computes",
    "gather": "when the first weights are gathered",
    "forward": "in the forward pass",
    "loss": "when the loss is computed",
    "backward": "in the backward pass",
    "update": "in the optimizer's update",
}


def render_plan(plan: RecipePlan, columns: int, price: float | None = None) -> Iterator[str]:
    """All lines of the plan, none wider than `columns`.

    Args:
        price: of an hour of one GPU, in any currency.
    """
    yield f"{plan.name} on {plan.cluster}: {plan.verdict}"
    base = f"{plan.base}, {count(plan.shape.parameters)} parameters"
    if plan.shape.experts:
        active = count(plan.shape.active_parameters)
        base += f", {active} of them for a token, embeddings included"
    yield from _labeled("base model", base, columns)
    for stage in plan.stages:
        yield ""
        yield from _stage_lines(stage, plan, columns)
    yield ""
    yield "whole run"
    for label, text in _whole_items(plan, price):
        yield from _labeled(label, text, columns)
    yield ""
    yield from _option_lines(plan)


def _labeled(label: str, text: str, columns: int) -> Iterator[str]:
    """A label in a column of its own, and its text, wrapped."""
    width = max(20, columns - LABEL_COLUMNS - 2)
    for index, line in enumerate(wrap(text, width) or [""]):
        yield f"  {label if index == 0 else '':<{LABEL_COLUMNS}}{line}"


def _stage_lines(stage: StagePlan, plan: RecipePlan, columns: int) -> Iterator[str]:
    yield f"stage {stage.name}: {stage.fit.verdict}"
    for label, text in _stage_items(stage, plan):
        yield from _labeled(label, text, columns)


def _stage_items(stage: StagePlan, plan: RecipePlan) -> Iterator[tuple[str, str]]:
    """Label and text of everything that the plan says about a stage."""
    workload = stage.workload
    yield "settings", _settings_text(workload)
    total = plan.shape.parameters
    if workload.traits.adds_adapter:
        total += workload.trainable
    yield "trainable", f"{workload.trainable:,} parameters ({workload.trainable / total:.2%})"
    yield from _memory_items(stage)
    if stage.simulated:
        yield from _simulation_items(stage, stage.simulated)
    for change in stage.suggestions:
        yield "would fit", f"{change.arguments(stage.name)}  ({change.cost})"
    if stage.fit.verdict != FITS and not stage.suggestions:
        yield "would fit", "no change that the plan knows"
    yield (
        "host memory",
        f"per node: {size(host_load_bytes(workload))} to load, "
        f"{size(host_save_bytes(workload))} to train, {size(host_merge_bytes(workload))} to merge",
    )
    saved = f"{size(checkpoint_bytes(workload))} per checkpoint, {size(stage.disk)} in total"
    yield "disk", saved
    yield "communication", _communication_text(stage, plan.cluster)
    rate = stage.speed
    yield "speed", f"{count(rate.middle)} tokens/s ({count(rate.low)} to {count(rate.high)})"
    yield "training", _training_text(stage)
    if stage.minutes_before:
        yield "", f"of which about {duration(60 * stage.minutes_before)} before the first step"
    yield "time", _time_text(stage)
    for caveat in stage.caveats:
        yield "low confidence", caveat
    if stage.correction:
        yield "calibration", _correction_text(stage.correction)


def _settings_text(workload: Workload) -> str:
    """Method, engine and batch."""
    method = workload.method.kind
    if rank := workload.method.rank:
        method += f" with rank {rank}"
    engine = workload.engine
    if workload.capabilities.shards_base:
        ranks = "1 rank" if workload.shard == 1 else f"{workload.shard} ranks"
        engine += f", {ranks} per copy"
    if workload.offload:
        engine += ", offload"
    batch = f"micro-batch of {workload.micro_batch} x {workload.sequence_length} tokens"
    if workload.accumulation > 1:
        batch += f", {workload.accumulation} accumulated"
    checkpointing = ", activations recomputed" if workload.checkpointing else ""
    return f"{method}; {engine}; {batch}{checkpointing}"


def _memory_items(stage: StagePlan) -> Iterator[tuple[str, str]]:
    """The terms of a GPU's memory at the peak, and the verdict."""
    memory, fit = stage.memory, stage.fit
    yield "GPU memory", " + ".join(_visible_terms(memory.terms().items(), memory.peak))
    has_fewer_logits = fit.lower < memory.peak
    every = " for every token" if has_fewer_logits else ""
    yield "", f"= {size(memory.peak)} of tensors at the peak, {MOMENTS[memory.moment]}{every}"
    few = " if few tokens are targets" if has_fewer_logits else ""
    needed = f"at least {size(fit.lower)}{few}, budget {size(fit.budget)} of {size(fit.usable)}"
    yield "", f"{needed}: {fit.verdict}"


def _visible_terms(terms: Iterable[tuple[str, float]], total: float) -> Iterator[str]:
    return (f"{name} {size(value)}" for name, value in terms if value >= MIN_SHARE * total)


def _simulation_items(stage: StagePlan, step: SimulatedStep) -> Iterator[tuple[str, str]]:
    """The peak of the simulated step, next to the plan's."""
    peak, planned = step.peak, stage.memory.peak
    error = planned / peak.total - 1
    yield (
        "simulated",
        f"{size(peak.total)} of tensors at the peak; the plan's {size(planned)} differ "
        f"by {error:+.1%}",
    )
    module = f", {peak.module}" if peak.module else ""
    yield "", f"{MOMENTS[peak.phase]}, {peak.region}{module}"
    terms = sorted(peak.terms.items(), key=lambda item: -item[1])
    yield "", " + ".join(_visible_terms(terms, peak.total))
    *first, last = (str(layers) for layers in step.layers)
    depths = f"{', '.join(first)} and {last}" if first else last
    workload = stage.workload
    yield (
        "",
        f"with {depths} of {workload.shape.layers} layers, on one of {workload.ranks} ranks",
    )


def _communication_text(stage: StagePlan, cluster: Cluster) -> str:
    """Bytes of an optimizer step, and the bandwidths that the plan assumes."""
    if not stage.received:
        return "none"
    gpu, network = cluster.gpu, cluster.gpu.network_gb_s * cluster.gpus_per_node
    received = f"each GPU receives {size(stage.received)} per step"
    assumed = f"assuming {gpu.link_gb_s:g} GB/s inside a node"
    if stage.entering:
        received += f", {size(stage.entering)} enter each node"
        assumed += f" and {network:g} GB/s into it"
    return f"{received} ({assumed})"


def _training_text(stage: StagePlan) -> str:
    """The hours of training; for a billion tokens where the number of tokens is not known."""
    hours = stage.time.training
    if stage.tokens is None or hours is None:
        billion = 1e9 / stage.speed.middle
        return f"{duration(billion)} for 1B tokens (the data are not on this machine)"
    about = "" if stage.tokens.is_exact else "about "
    tokens = f"for {about}{count(stage.tokens.tokens)} tokens"
    if hours.high * 3600 < 1:
        return f"under a second, {tokens}"
    return f"{_range(hours, _format_hours)}, {tokens}"


def _time_text(stage: StagePlan) -> str:
    """The whole time of a stage, and what it is spent on in addition to the training."""
    time = stage.time
    other = {
        "load": time.load,
        "evaluate": time.evaluation,
        "save": time.saves,
        "merge": time.merge,
    }
    parts = [f"{_format_hours(x)} to {name}" for name, x in other.items() if x * 3600 >= 0.5]
    if time.total is None:
        return f"in addition {', '.join(parts) or 'less than a second'}"
    total = time.total.middle
    on_gpus = f"{_format_hours(total)}, {total * stage.workload.ranks:.3g} GPU-hours"
    return f"{on_gpus}: {', '.join(['the training', *parts])}"


def _whole_items(plan: RecipePlan, price: float | None) -> Iterator[tuple[str, str]]:
    """Time and cost of all stages."""
    hours, on_gpus = plan.hours, plan.gpu_hours
    if hours is None or on_gpus is None:
        missing = " and ".join(x.name for x in plan.stages if x.tokens is None)
        yield "time", f"not known: the data of {missing} are not on this machine"
        yield "", "set train.steps or train.tokens to plan without them"
        return
    yield "time", _range(hours, _format_hours)
    yield "GPU-hours", _range(on_gpus, "{:.3g}".format)
    if price is not None:
        cost = _range(on_gpus.times(price), "{:,.2f}".format)
        yield "cost", f"{cost} at {price:g} per GPU-hour"
    for text in plan.not_timed:
        yield "not in it", text


def _range(estimate: Estimate, form: Callable[[float], str]) -> str:
    middle, low, high = map(form, (estimate.middle, estimate.low, estimate.high))
    return middle if low == high else f"{middle} ({low} to {high})"


def _format_hours(hours: float) -> str:
    return duration(hours * 3600) if hours < 48 else f"{hours / 24:.1f} days"


def _correction_text(correction: Correction) -> str:
    stages = "1 stage" if correction.stages == 1 else f"{correction.stages} stages"
    return (
        f"corrected by {stages} run here: memory x {correction.memory_factor:.2f}, "
        f"speed x {correction.speed_ratio:.2f}"
    )


def _option_lines(plan: RecipePlan) -> Iterator[str]:
    """Engines and methods side by side."""
    yield f"engines and methods for stage {plan.largest.name}, best first"
    yield "  (where it does not fit: the missing memory, and the largest term)"
    width = max(len(option.workload.method.kind) for option in plan.options) + 2
    head = f"  {'engine':<11}{'method':<{width}}{'micro':>5}{'budget':>9}  {'verdict':<13}"
    yield f"{head}{'tokens/s':>8}  sent per step"
    for option in plan.options:
        workload = option.workload
        line = f"  {option.engine:<11}{workload.method.kind:<{width}}{workload.micro_batch:>5}"
        line += f"{size(option.fit.budget):>9}  {option.fit.verdict:<13}{count(option.speed):>8}"
        yield f"{line}  {option.reason}"
