"""The plan as a person reads it, in as many columns as there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from textwrap import wrap

from dtrain.core.units import count, duration, size
from dtrain.planning.calibration import Correction
from dtrain.planning.communication import entering_bytes, received_bytes
from dtrain.planning.fit import FITS
from dtrain.planning.plan import RecipePlan, StagePlan
from dtrain.planning.simulated_peak import SimulationResult
from dtrain.planning.storage import (
    checkpoint_bytes,
    host_load_bytes,
    host_merge_bytes,
    host_save_bytes,
)
from dtrain.planning.workload import Cluster

LABEL = 14
LEAST_SHARE = 0.002  # of a peak; terms below it are not listed
MOMENTS = {
    "loading": "while the base is loaded",
    "gather": "as the first layer's weights arrive",
    "forward": "in the forward pass",
    "loss": "when the loss is computed",
    "backward": "in the backward pass",
    "update": "in the optimizer's update",
}


def lines_of(plan: RecipePlan, columns: int) -> Iterator[str]:
    """The whole screen."""
    cluster = plan.cluster
    where = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    yield f"{plan.name} on {where}: {plan.verdict}"
    yield from _item("base", f"{plan.base}, {count(plan.shape.parameters)} parameters", columns)
    for stage in plan.stages:
        yield ""
        yield from stage_lines(stage, plan, columns)
    yield ""
    yield from option_lines(plan, columns)


def _item(label: str, text: str, columns: int) -> Iterator[str]:
    """A label and its text, wrapped beside it."""
    room = max(20, columns - LABEL - 2)
    for number, line in enumerate(wrap(text, room) or [""]):
        yield f"  {label if number == 0 else '':<{LABEL}}{line}"


def stage_lines(stage: StagePlan, plan: RecipePlan, columns: int) -> Iterator[str]:
    """What the plan says of one stage."""
    workload = stage.workload
    yield f"stage {stage.name}: {stage.fit.verdict}"
    yield from _item("way", way(stage), columns)
    total = plan.shape.parameters + (0 if workload.is_full else workload.trainable)
    share = f"{workload.trainable:,} parameters ({workload.trainable / total:.2%})"
    yield from _item("trains", share, columns)
    yield from memory_lines(stage, columns)
    if stage.exact:
        yield from exact_lines(stage, stage.exact, columns)
    for change in stage.changes:
        yield from _item("would fit", f"{' '.join(change.settings)}  ({change.cost})", columns)
    if stage.fit.verdict != FITS and not stage.changes:
        yield from _item("would fit", "nothing that the plan knows", columns)
    host = (
        f"{size(host_load_bytes(workload))} a node at load, {size(host_save_bytes(workload))} in "
        f"training, {size(host_merge_bytes(workload))} at merge"
    )
    yield from _item("host memory", host, columns)
    saved = f"{size(checkpoint_bytes(workload))} a checkpoint, {size(stage.disk)} in all"
    yield from _item("disk", saved, columns)
    yield from _item("wire", wire(stage, plan.cluster), columns)
    yield from _item("speed", speed(stage), columns)
    yield from _item("time", time(stage), columns)
    for doubt in stage.doubts:
        yield from _item("low confidence", f" {doubt}", columns)
    if stage.measured:
        yield from _item("measured", told(stage.measured), columns)


def way(stage: StagePlan) -> str:
    """Method, engine and batch in words."""
    workload = stage.workload
    method = workload.method if workload.is_full else f"{workload.method} r {workload.rank}"
    ranks = "1 rank" if workload.shard == 1 else f"{workload.shard} ranks"
    engine = workload.engine + (f", {ranks} a copy" if workload.is_sharded else "")
    engine += ", offload" if workload.offload else ""
    batch = f"{workload.micro_batch} x {workload.sequence_length} tokens at once"
    batch += f", {workload.accumulation} times" if workload.accumulation > 1 else ""
    kept = ", activations recomputed" if workload.checkpointing else ""
    return f"{method}; {engine}; {batch}{kept}"


def memory_lines(stage: StagePlan, columns: int) -> Iterator[str]:
    """The terms of a GPU's memory and the verdict."""
    memory, fit = stage.memory, stage.fit
    terms = " + ".join(_listed(memory.terms().items(), memory.peak))
    yield from _item("GPU memory", terms, columns)
    text = f"= {size(memory.peak)} of tensors at the peak, {MOMENTS[memory.moment]}"
    yield from _item("", text, columns)
    text = f"at least {size(fit.lower)}, budget {size(fit.budget)}"
    yield from _item("", f"{text} of {size(fit.usable)}: {fit.verdict}", columns)


def _listed(terms: Iterable[tuple[str, float]], total: float) -> Iterator[str]:
    """Those that a rounded sum would miss."""
    return (f"{name} {size(value)}" for name, value in terms if value >= LEAST_SHARE * total)


def exact_lines(stage: StagePlan, exact: SimulationResult, columns: int) -> Iterator[str]:
    """What the simulation found, beside the plan."""
    peak, planned = exact.peak, stage.memory.peak
    text = f"{size(peak.total)} of tensors; the plan's {size(planned)} are "
    yield from _item("exact", f"{text}{planned / peak.total - 1:+.1%} off", columns)
    named = f", {peak.module}" if peak.module else ""
    yield from _item("", f"{MOMENTS[peak.phase]}, {peak.place}{named}", columns)
    terms = sorted(peak.terms.items(), key=lambda item: -item[1])
    yield from _item("", " + ".join(_listed(terms, peak.total)), columns)
    *some, last = (str(count) for count in exact.layers)
    layers = f"{', '.join(some)} and {last}" if some else last
    ranks = f"one of {stage.workload.ranks} ranks"
    yield from _item(
        "", f"simulated: {layers} of {stage.workload.shape.layers} layers, {ranks}", columns
    )


def wire(stage: StagePlan, cluster: Cluster) -> str:
    """Bytes of an optimizer step, and the links that the plan takes for granted."""
    received, entering = received_bytes(stage.workload), entering_bytes(stage.workload)
    if not received:
        return "nothing"
    gpu, network = cluster.gpu, cluster.gpu.network_gb_s * cluster.gpus_per_node
    between = f", {size(entering)} enter each node" if entering else ""
    into = f", {network:g} GB/s into it" if entering else ""
    assumed = f"assumed: {gpu.link_gb_s:g} GB/s inside a node{into}"
    return f"a GPU receives {size(received)} in a step{between} ({assumed})"


def speed(stage: StagePlan) -> str:
    """Tokens a second, with its range."""
    rate = stage.speed
    return f"{count(rate.middle)} tokens/s ({count(rate.low)} to {count(rate.high)})"


def time(stage: StagePlan) -> str:
    """Hours and GPU-hours, or what is known instead."""
    if stage.amount is None or stage.hours is None:
        billion = 1e9 / stage.speed.middle
        return f"{duration(billion)} for 1B tokens (the data are not on this machine)"
    about = "" if stage.amount.is_exact else "about "
    hours, ranks = stage.hours, stage.workload.ranks
    if hours.high * 3600 < 1:
        return f"under a second, for {about}{count(stage.amount.tokens)} tokens"
    return (
        f"{spell(hours.middle)} ({spell(hours.low)} to {spell(hours.high)}), "
        f"{hours.middle * ranks:.3g} GPU-hours, for {about}{count(stage.amount.tokens)} tokens"
    )


def spell(hours: float) -> str:
    """Hours as a person says them."""
    return duration(hours * 3600) if hours < 48 else f"{hours / 24:.1f} days"


def told(measured: Correction) -> str:
    """What earlier runs corrected."""
    runs = "1 stage" if measured.stages == 1 else f"{measured.stages} stages"
    return (
        f"corrected by {runs} run here: memory x {measured.memory_factor:.2f}, "
        f"speed x {measured.speed_ratio:.2f}"
    )


def option_lines(plan: RecipePlan, columns: int) -> Iterator[str]:
    """Engines and methods side by side."""
    stage = plan.worst
    yield f"engines and methods for stage {stage.name}, best first;"
    yield "  where it does not fit: by how much, and the largest term"
    head = f"  {'engine':<11}{'method':<7}{'micro':>5}{'budget':>9}  {'verdict':<13}{'tokens/s':>8}"
    yield f"{head}  a step sends"
    for option in plan.options:
        workload = option.workload
        line = (
            f"  {option.engine:<11}{workload.method:<7}{workload.micro_batch:>5}"
            f"{size(option.fit.budget):>9}  {option.fit.verdict:<13}{count(option.speed):>8}"
        )
        yield f"{line}  {option.reason}"
