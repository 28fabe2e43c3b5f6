"""What is wrong with a stage's curves, with the evidence and the usual remedy.

Every rule reads the records of metrics.jsonl alone, so a report, a live view and the training
itself find the same alerts. The thresholds leave a healthy curve (fast, then steady, then flat)
without an alert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dtrain.monitoring.metrics import is_number

Records = Sequence[dict[str, Any]]
Points = list[tuple[int, float]]

WINDOW = 20  # steps whose median is "now"
SPIKE_DEVIATIONS = 8.0  # from the median of the steps before, in median absolute deviations
MIN_SPIKE = 0.5  # nats; smaller jumps are noise whatever their deviation
DIVERGENCE = 1.1  # of the lowest median loss, where the loss is also above its start
MIN_FALL = 0.01  # of the first loss, over a whole stage
MIN_EVALUATIONS = 3  # with fewer there is no trend
OVERFIT = 0.02  # of the lowest held-out loss
ZERO_LOSS = 1e-3
NORM_GROWTH = 4.0
LOAD_GROWTH = 2.0
SLOW = 0.7  # of the median speed
STARVED = 0.2  # of the step's time
FULL = 0.95  # of the GPU's memory


@dataclass(frozen=True)
class Alert:
    """A problem in a curve.

    Attributes:
        kind: what it is, in a word or two; at most one alert of a kind and stage.
        step: where it was seen.
        evidence: the figures.
        advice: what usually helps.
    """

    kind: str
    step: int
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.kind} at step {self.step}: {self.evidence}; {self.advice}"


def find_alerts(records: Records) -> list[Alert]:
    """All alerts of a stage, in the order of their steps."""
    alerts = [alert for rule in RULES for alert in rule(records)]
    return sorted(alerts, key=lambda alert: alert.step)


def _numbers(record: dict[str, Any], key: str) -> dict[str, float]:
    """The finite numbers of a mapping in a record; empty if there is none."""
    value = record.get(key)
    items = value.items() if isinstance(value, dict) else ()
    return {n: float(v) for n, v in items if is_number(v)}


def _points(records: Records, key: str) -> Points:
    """(step, value) of every record with a finite number under `key`."""
    points = [(record["step"], record.get(key)) for record in records]
    return [(s, float(v)) for s, v in points if is_number(v)]


def _median(points: Points) -> float:
    return median(value for _, value in points)


def _skipped(records: Records) -> Iterator[Alert]:
    steps = [record["step"] for record in records if record.get("skipped")]
    if steps:
        evidence = f"{len(steps)} of {len(_points(records, 'tokens'))} updates were skipped"
        yield Alert(
            "non-finite steps", steps[0], evidence, "lower the learning rate, or check those rows"
        )


def _spike(records: Records) -> Iterator[Alert]:
    points = _points(records, "loss")
    worst, worst_excess, count = 0, 0.0, 0
    for i in range(WINDOW, len(points)):
        before = points[i - WINDOW : i]
        center = _median(before)
        spread = median(abs(value - center) for _, value in before)
        excess = points[i][1] - center
        if excess > max(MIN_SPIKE, SPIKE_DEVIATIONS * spread):
            count += 1
            if excess > worst_excess:
                worst, worst_excess = i, excess
    if count:
        step, value = points[worst]
        evidence = f"the loss was {value:.3f}, {worst_excess:.3f} above the steps before"
        if count > 1:
            evidence += f"; {count} spikes in all"
        yield Alert(
            "loss spike",
            step,
            evidence,
            "check the rows of that step; a lower learning rate or "
            "a larger batch makes spikes rarer",
        )


def _divergence(records: Records) -> Iterator[Alert]:
    points = _points(records, "loss")
    if len(points) < 2 * WINDOW:
        return
    medians = [_median(points[i : i + WINDOW]) for i in range(len(points) - WINDOW + 1)]
    lowest, now = min(medians), medians[-1]
    if now > DIVERGENCE * lowest and now > medians[0]:
        evidence = (
            f"the loss is {now:.3f}, was {medians[0]:.3f} at the start and {lowest:.3f} at best"
        )
        advice = "lower the learning rate to a half or a tenth, and check the data"
        yield Alert("divergence", points[-1][0], evidence, advice)


def _no_progress(records: Records) -> Iterator[Alert]:
    points = _points(records, "loss")
    if len(points) < 4 * WINDOW:
        return
    first, last = _median(points[:WINDOW]), _median(points[-WINDOW:])
    if abs(first - last) < MIN_FALL * first:
        evidence = f"the loss was {first:.3f} and is {last:.3f} after {len(points)} steps"
        advice = "raise the learning rate or the rank, or train on more modules"
        yield Alert("plateau", points[-1][0], evidence, advice)


def _overfitting(records: Records) -> Iterator[Alert]:
    training = _points(records, "loss")
    held_out: dict[str, Points] = {}
    for record in records:
        for name, loss in _numbers(record, "held_out").items():
            held_out.setdefault(name, []).append((record["step"], loss))
    for name, losses in held_out.items():
        if len(losses) < MIN_EVALUATIONS:
            continue
        best_step, best = min(losses, key=lambda point: point[1])
        step, last = losses[-1]
        before = [point for point in training if point[0] <= best_step][-WINDOW:]
        if not before or last <= (1 + OVERFIT) * best:
            continue
        then, now = _median(before), _median(training[-WINDOW:])
        if now < then:
            evidence = (
                f"held-out loss of {name} rose from {best:.3f} (step {best_step}) to {last:.3f}, "
                f"and the training loss fell from {then:.3f} to {now:.3f}"
            )
            advice = "train for fewer epochs, lower r, or add data"
            yield Alert("overfitting", step, evidence, advice)
            return


def _zero_loss(records: Records) -> Iterator[Alert]:
    points = _points(records, "loss")
    zeros = [step for step, value in points if abs(value) < ZERO_LOSS]
    if points and len(zeros) > len(points) // 20 and len(zeros) >= 3:
        evidence = f"the loss is below {ZERO_LOSS:g} at {len(zeros)} steps"
        yield Alert(
            "loss at zero",
            zeros[0],
            evidence,
            "look for duplicates, or for targets that their prompt contains (dtrain data show)",
        )


def _norm_growth(records: Records) -> Iterator[Alert]:
    points = _points(records, "grad_norm")
    if len(points) < 4 * WINDOW:
        return
    usual, now = _median(points[WINDOW:-WINDOW]), _median(points[-WINDOW:])
    if now > NORM_GROWTH * usual > 0:
        evidence = f"its median rose from {usual:.3g} to {now:.3g}"
        yield Alert(
            "growing gradient norm",
            points[-1][0],
            evidence,
            "lower the learning rate before the loss diverges",
        )


def _uneven_experts(records: Records) -> Iterator[Alert]:
    points = list[tuple[int, float]]()
    for record in records:
        layers = record.get("experts")
        loads = [_numbers(layers, name) for name in layers] if isinstance(layers, dict) else []
        if worst := [load["max_load"] for load in loads if "max_load" in load]:
            points.append((record["step"], max(worst)))
    if len(points) < 4 * WINDOW:
        return
    first, now = _median(points[:WINDOW]), _median(points[-WINDOW:])
    if now > LOAD_GROWTH * first > 0:
        evidence = (
            f"the busiest expert of a layer got {first:.1f} times an even share of its tokens, and "
            f"gets {now:.1f} times"
        )
        yield Alert("uneven experts", points[-1][0], evidence, "lower the learning rate")


def _slow(records: Records) -> Iterator[Alert]:
    points = _points(records, "tokens_per_second")
    if len(points) < 3 * WINDOW:
        return
    usual, now = _median(points), _median(points[-WINDOW:])
    if now < SLOW * usual:
        evidence = f"{now:.0f} tokens/s, {usual:.0f} before"
        yield Alert(
            "slower steps",
            points[-1][0],
            evidence,
            "look for other work on the node, a hot GPU, or a slow file system",
        )


def _starved(records: Records) -> Iterator[Alert]:
    times = [(record["step"], _numbers(record, "seconds")) for record in records]
    recent = [(step, seconds) for step, seconds in times if "data" in seconds][-WINDOW:]
    waits = sum(seconds.get("data", 0.0) for _, seconds in recent)
    total = sum(value for _, seconds in recent for value in seconds.values())
    if len(recent) == WINDOW and waits > STARVED * total:
        evidence = f"{100 * waits / total:.0f} % of a step is spent on reading data"
        yield Alert(
            "data starved", recent[-1][0], evidence, "put the cache (DTRAIN_CACHE) on a local disk"
        )


def _memory(records: Records) -> Iterator[Alert]:
    capacity = _points(records, "memory_capacity_bytes")
    reserved = _points(records, "memory_reserved_bytes")
    if capacity and reserved:
        step, used = max(reserved, key=lambda point: point[1])
        if used > FULL * capacity[-1][1] > 0:
            evidence = f"{100 * used / capacity[-1][1]:.0f} % of the GPU's memory is reserved"
            advice = "lower train.micro_batch_size, or set model.gradient_checkpointing"
            yield Alert("GPU memory nearly full", step, evidence, advice)


RULES: tuple[Callable[[Records], Iterator[Alert]], ...] = (
    _skipped,
    _spike,
    _divergence,
    _no_progress,
    _overfitting,
    _zero_loss,
    _norm_growth,
    _uneven_experts,
    _slow,
    _starved,
    _memory,
)
