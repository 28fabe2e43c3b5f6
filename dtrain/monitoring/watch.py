"""The state of runs as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dtrain.core.output import visible
from dtrain.core.units import duration, size
from dtrain.monitoring.run_state import RunState, StageState, read_state

BARS = "▁▂▃▄▅▆▇█"
CURVE_COLUMNS = 32
COLUMNS = ("stage", "step", "left", "loss", "rate", "norm", "tokens/s", "memory")
COLORS = {"running": "cyan", "finished": "green", "failed": "red"}
DIM = "dim"


def render_run(state: RunState) -> RenderableType:
    """A panel with the stages, alerts and newest log lines of a run."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style=DIM)
    for title in COLUMNS:
        table.add_column(title, no_wrap=True)
    for stage in state.stages:
        table.add_row(*map(_text, _stage_cells(stage)))
    parts: list[RenderableType] = [table]
    parts += [_text(_curve_line(stage)) for stage in state.stages if stage.losses]
    if state.reason:
        parts.append(_text(state.reason, "red"))
    for stage in state.stages:
        parts += [_text(f"! {stage.name}: {alert}", "yellow") for alert in stage.alerts]
    for line in state.log:
        text = _text(line, DIM)
        text.no_wrap, text.overflow = True, "ellipsis"
        parts.append(text)
    color = COLORS.get(state.state, "yellow")
    headline = Text.assemble(_text(state.name), " ", (_headline(state), color))
    subtitle = _text(state.folder)
    return Panel(Group(*parts), title=headline, title_align="left", subtitle=subtitle)


def _text(text: str, style: str = "") -> Text:
    """Other people's text: no markup, and nothing that steers the terminal."""
    return Text(visible(text), style=style)


def _headline(state: RunState) -> str:
    words = [state.state]
    if state.state in ("running", "silent") and state.seconds_since_change is not None:
        words.append(f"last change {duration(state.seconds_since_change)} ago")
    if state.seconds_left is not None:
        words.append(f"all stages in {duration(state.seconds_left)}")
    return ", ".join(words)


def _stage_cells(stage: StageState) -> list[str]:
    if not stage.step:
        return [stage.name, stage.state]
    left = "done" if stage.state == "complete" else ""
    if stage.seconds_left is not None:
        left = duration(stage.seconds_left)
    return [
        stage.name,
        f"{stage.step}/{stage.total_steps}" if stage.total_steps else str(stage.step),
        left,
        _figure(stage.loss, ".3f"),
        _figure(stage.learning_rate, ".2g"),
        _figure(stage.grad_norm, ".2g"),
        _figure(stage.tokens_per_second, ".0f"),
        size(stage.peak_memory_bytes) if stage.peak_memory_bytes else "",
    ]


def _curve_line(stage: StageState) -> str:
    held_out = ", ".join(f"{name} {loss:.3f}" for name, loss in stage.held_out.items())
    line = f"{stage.name} {curve(stage.losses)}"
    return f"{line}  held-out: {held_out}" if held_out else line


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def curve(values: Sequence[float]) -> str:
    """A curve of block characters, each the mean of an equal part of the values."""
    if not values:
        return ""
    columns = min(CURVE_COLUMNS, len(values))
    edges = [i * len(values) // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def read_states(folders: Sequence[Path]) -> list[RunState]:
    """The states of several runs."""
    return [read_state(folder) for folder in folders]
