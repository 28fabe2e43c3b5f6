"""Plot a stage's loss, learning rate, gradient norm, speed and memory as one SVG image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

MAX_POINTS = 600  # more are indistinguishable in the image, and make the report large
MAX_MARKERS = 40  # curves with more points have no markers
COLORS = ["#c2571a", "#2a7f62", "#8a4fbf", "#b0892b", "#a63d57"]
INK, LINE, GRID = "#3b4252", "#2f5fa8", "#e3e7ee"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text searchable; a quarter of the size of outlines
    "svg.hashsalt": "dtrain",
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": "#c3cad6",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

SMALL_PLOTS = (
    ("learning_rate", "learning rate", 1.0),
    ("grad_norm", "gradient norm", 1.0),
    ("tokens_per_second", "tokens per second", 1.0),
    ("peak_memory_bytes", "peak memory, GB", 1e-9),
)

Records = Sequence[dict[str, Any]]
Points = list[tuple[float, float]]
Ends = Mapping[str, tuple[float | None, float | None]]


def plot_stage(records: Records, ends: Ends | None = None) -> str:
    """An SVG image of a stage as a data URI; empty if nothing was measured.

    Args:
        ends: held-out losses before the first and after the last step, by evaluation set.
    """
    if not any("loss" in record or "held_out" in record for record in records):
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.4), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.add_gridspec(2, 4, height_ratios=[1.7, 1])
        _draw_losses(figure.add_subplot(grid[0, :]), records, ends or {})
        for column, (key, title, scale) in enumerate(SMALL_PLOTS):
            axes = figure.add_subplot(grid[1, column])
            _draw(axes, [(x, y * scale) for x, y in series(records, key)], title)
        return data_uri(figure)


def plot_runs(runs: Mapping[str, Records]) -> str:
    """An SVG image of a stage's losses in several runs as a data URI; empty without any.

    Left the smoothed training losses, right the held-out losses: a color is a run, a dash a set.
    """
    if not any("loss" in record for records in runs.values() for record in records):
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        training, held_out = figure.subplots(1, 2)
        for (name, records), color in zip(runs.items(), cycle([LINE, *COLORS]), strict=False):
            points = series(records, "loss")
            curves = [(training, smooth(points) if points else [], "-")]
            dashes = cycle(["-", "--", ":", "-."])
            for measured, dash in zip(held_out_losses(records).values(), dashes, strict=False):
                curves.append((held_out, measured, dash))
            for number, (axes, curve, dash) in enumerate(curves):
                label = name if number == 0 else None
                axes.plot(*_columns(curve), color=color, linewidth=1.6, linestyle=dash, label=label)
        names = dict.fromkeys(n for records in runs.values() for n in held_out_losses(records))
        training.set_title("training loss, smoothed")
        held_out.set_title(f"held-out loss: {', '.join(names)}" if names else "held-out loss")
        training.legend(loc="upper right")
        for axes in (training, held_out):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        return data_uri(figure)


def series(records: Records, key: str) -> Points:
    """(step, value) of every record with a number under `key`; long series are averaged in bins."""
    points = [
        (float(record["step"]), float(record[key]))
        for record in records
        if isinstance(record.get(key), int | float)
    ]
    width = -(-len(points) // MAX_POINTS)
    if width <= 1:
        return points
    chunks = [points[i : i + width] for i in range(0, len(points), width)]
    return [(_mean([x for x, _ in chunk]), _mean([y for _, y in chunk])) for chunk in chunks]


def smooth(points: Points) -> Points:
    """An exponential moving average with a time constant of 1/40 of the points."""
    weight = 1 / max(1.0, len(points) / 40)
    result, mean = [], points[0][1]
    for x, y in points:
        mean += weight * (y - mean)
        result.append((x, mean))
    return result


def held_out_losses(records: Records, ends: Ends | None = None) -> dict[str, Points]:
    """(step, loss) of every evaluation, by evaluation set, with those before and after."""
    measured = [(record["step"], record.get("held_out") or {}) for record in records]
    last = max((step for step, _ in measured), default=0)
    before = {name: pair[0] for name, pair in (ends or {}).items()}
    after = {name: pair[1] for name, pair in (ends or {}).items()}
    result: dict[str, Points] = {}
    for step, losses in ((0, before), *measured, (last, after)):
        for name, loss in losses.items():
            if isinstance(loss, int | float):
                result.setdefault(name, []).append((float(step), float(loss)))
    return result


def source_losses(records: Records) -> dict[str, Points]:
    """(step, smoothed training loss) of each of several sources."""
    names = {name: None for record in records for name in record.get("sources") or {}}
    result = {}
    for name in names:
        lines = [
            {"step": record["step"], "loss": (record["sources"].get(name) or {}).get("loss")}
            for record in records
            if isinstance(record.get("sources"), dict)
        ]
        if points := series(lines, "loss"):
            result[name] = smooth(points)
    return result


def _draw_losses(axes: Axes, records: Records, ends: Ends) -> None:
    losses = series(records, "loss")
    losses_by_set = held_out_losses(records, ends).items()
    _draw(axes, losses, "loss", label="training")
    if len(losses) > MAX_MARKERS:
        axes.lines[-1].set(alpha=0.35, label=None, linewidth=1)
        axes.plot(*_columns(smooth(losses)), color=LINE, linewidth=1.8, label="training, smoothed")
    for (name, points), color in zip(losses_by_set, cycle(COLORS), strict=False):
        axes.plot(
            *_columns(points),
            color=color,
            linewidth=1.3,
            label=f"held-out: {name}",
            marker="o" if len(points) <= MAX_MARKERS else None,
            markersize=4,
        )
    for (name, points), color in zip(source_losses(records).items(), cycle(COLORS), strict=False):
        style: dict[str, Any] = {"color": color, "linewidth": 1.3, "linestyle": "--"}
        axes.plot(*_columns(points), label=f"training: {name}", **style)
    for i, step in enumerate(r["step"] for r in records if "skipped" in r):
        axes.axvline(
            step, color="#d03b3b", linewidth=1, alpha=0.6, label=None if i else "skipped step"
        )
    axes.set_xlabel("step")
    axes.legend(loc="upper right", ncols=2)


def _draw(axes: Axes, points: Points, title: str, label: str | None = None) -> None:
    axes.plot(
        *_columns(points),
        color=LINE,
        linewidth=1.6,
        label=label,
        marker="." if len(points) <= MAX_MARKERS else None,
    )
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if title != "loss" and points:
        axes.set_ylim(0, 1.12 * max(y for _, y in points) or 1)
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#8a93a3")


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def data_uri(figure: Figure) -> str:
    """A figure as an SVG image in a data URI."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
