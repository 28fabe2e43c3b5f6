"""Pictures of a sweep: its parameters in parallel coordinates, and the losses of its trials."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dtrain.config.sweep import Choices, Range
from dtrain.monitoring.plots import INK, LINE, STYLE, data_uri
from dtrain.sweep.record import Trial

BEST, WORST, PRUNED = LINE, "#d9c9a3", "#b9c0cc"
COLORS = LinearSegmentedColormap.from_list("losses", [BEST, "#7fa08f", WORST])
MAX_TICKS = 9


def plot_parameters(
    trials: Sequence[Trial], space: dict[str, Choices | Range], names: Sequence[str]
) -> str:
    """Parallel coordinates as a data URI: a line for each trial, from its values to its loss.

    Lines of trials without a loss end before the last axis.

    Args:
        trials: the best first.
        names: of the parameters, for their axes.
    """
    losses = [trial.value for trial in trials if trial.value is not None]
    if not losses:
        return ""
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        scales = [_Scale(values) for values in space.values()]
        loss_scale = _Scale(Range("uniform", min(losses), max(losses)))
        for trial in reversed(trials):  # the best on top
            heights = [
                scale.height(trial.parameters[key])
                for scale, key in zip(scales, space, strict=True)
            ]
            if trial.value is not None:
                heights.append(loss_scale.height(trial.value))
            _draw_trial(axes, heights, _rank(trial, losses), is_best=trial is trials[0])
        for x, scale in enumerate([*scales, loss_scale]):
            _draw_axis(axes, x, scale)
        axes.set_xticks(range(len(scales) + 1), [*names, "loss"])
        axes.tick_params(axis="x", length=0, pad=10, labelsize=9.5)
        axes.set_yticks([])
        axes.set_xlim(-0.25, len(scales) + 0.35)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return data_uri(figure)


class _Scale:
    """Maps values of a parameter to heights from 0 to 1."""

    def __init__(self, values: Choices | Range) -> None:
        self._values = values

    def height(self, value: Any) -> float:
        values = self._values
        if isinstance(values, Choices):
            return (values.values.index(value) + 0.5) / len(values.values)
        low, high = values.low, values.high
        if values.scale == "log":
            value, low, high = log(value), log(low), log(high)
        return (value - low) / (high - low) if high > low else 0.5

    @property
    def ticks(self) -> list[tuple[float, str]]:
        values = self._values
        if isinstance(values, Choices):
            step = -(-len(values.values) // MAX_TICKS)
            return [(self.height(value), str(value)) for value in values.values[::step]]
        if values.scale == "log":
            middle = (values.low * values.high) ** 0.5
        else:
            middle = (values.low + values.high) / 2
        labeled = {values.low, values.high} | (set() if values.scale == "int" else {middle})
        return [(self.height(value), f"{value:.4g}") for value in sorted(labeled)]


def _rank(trial: Trial, losses: list[float]) -> float | None:
    """0 for the best loss, 1 for the worst; None without a loss."""
    if trial.value is None:
        return None
    return sorted(losses).index(trial.value) / max(1, len(losses) - 1)


def _draw_trial(axes: Axes, heights: list[float], rank: float | None, *, is_best: bool) -> None:
    style: dict[str, Any] = {"color": PRUNED, "linewidth": 1.0, "linestyle": (0, (2, 3))}
    if rank is not None:
        style = {"color": COLORS(rank), "linewidth": 2.8 if is_best else 1.5}
    axes.plot(range(len(heights)), heights, marker="o", markersize=3, **style)


def _draw_axis(axes: Axes, x: int, scale: _Scale) -> None:
    axes.plot([x, x], [0, 1], color="#8a93a3", linewidth=1.0, zorder=0)
    for height, text in scale.ticks:
        axes.annotate(
            text, (x, height), xytext=(5, 0), textcoords="offset points", va="center", color=INK
        )


def plot_losses(trials: Sequence[Trial]) -> str:
    """The losses of the trials during the stage as a data URI; empty if none was measured.

    Args:
        trials: the best first.
    """
    losses = [trial.value for trial in trials if trial.value is not None]
    if not any(trial.points for trial in trials):
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for trial in reversed(trials):
            measured = [(step, loss) for step, loss in trial.points if loss is not None]
            rank = _rank(trial, losses)
            color = PRUNED if rank is None else COLORS(rank)
            width = 2.6 if trial is trials[0] else 1.4
            if measured:
                axes.plot(*zip(*measured, strict=True), color=color, linewidth=width)
            if trial.state == "pruned" and measured:
                axes.plot(*measured[-1], marker="x", color="#a8321f", markersize=6)
        axes.set_xlabel("step (x: pruned)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        return data_uri(figure)
