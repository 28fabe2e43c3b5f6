"""Compare runs: the keys that differ, their held-out losses and figures, and their curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dtrain.core.lazy_import import LazyModule
from dtrain.core.units import duration, size
from dtrain.monitoring.run_record import HeldOutLosses, RunRecord, align, format_loss, read_run
from dtrain.monitoring.scores import INPUTS, ScoreRow
from dtrain.monitoring.seed_groups import group_head, group_rows, seed_groups, verdicts
from dtrain.monitoring.uncertainty import CERTAIN, paired_standard_error

plots: Any = LazyModule("dtrain.monitoring.plots")

TEMPLATE = Path(__file__).with_name("compare.html.jinja")
STYLE = Path(__file__).with_name("report.css")
MISSING = "—"
ROWS_ONLY = (
    "± is the standard error over the held-out rows; another seed may change a loss by more: give "
    "several runs of each, with different seeds"
)
NO_LOSSES = (
    "No held-out loss to compare: name held-out rows in evaluation.sets. Training losses are of "
    "other rows at each step."
)
UNCOMPARED = ("name", "output.folder", "output.reuse")  # they differ between any two runs


@dataclass(frozen=True)
class Table:
    """A table of several runs.

    Attributes:
        head: title, then the names of the runs.
        rows: a name, then a text for each run.
    """

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the differences are from the first.

    Attributes:
        verdicts: sentences on whether the differences are more than chance.
    """

    names: list[str]
    records: list[RunRecord]
    tables: list[Table]
    verdicts: list[str]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read runs and compare them."""
    records = [read_run(folder) for folder in folders]
    names = _unique_names(records)
    groups, losses = seed_groups(records, names), list(_loss_rows(records))
    tables = [
        Table(["mean over seeds", *group_head(groups)], list(group_rows(groups))),
        Table(["held-out loss", *names], losses),
        Table(["held-out metric", *names], list(_metric_rows(records))),
        Table(["score", *names], list(_score_rows(records))),
        Table(["speed and memory", *names], list(_figure_rows(records))),
        Table(["key that differs", *names], list(_key_rows(records))),
    ]
    sentences = list(verdicts(groups))
    if not groups and any("±" in cell for row in losses for cell in row):
        sentences.append(ROWS_ONLY)
    if not losses:
        sentences.append(NO_LOSSES)
    return Comparison(names, records, [table for table in tables if table.rows], sentences)


def comparison_text(comparison: Comparison) -> str:
    """The tables for a terminal."""
    blocks = [
        align([[*row, ""] for row in (table.head, *table.rows)]) for table in comparison.tables
    ]
    if comparison.verdicts:
        blocks.insert(1, "\n".join(comparison.verdicts))
    return "\n\n".join(blocks)


def comparison_page(comparison: Comparison) -> str:
    """The tables and curves as one self-contained page of HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    stages = dict.fromkeys(name for record in comparison.records for name in record.metrics)
    curves = []
    for stage in stages:
        lines = [record.metrics.get(stage, []) for record in comparison.records]
        image = plots.plot_runs(dict(zip(comparison.names, lines, strict=True)))
        curves.append((stage, image))
    return template.render(
        comparison=comparison,
        curves=[(stage, image) for stage, image in curves if image],
        style=STYLE.read_text(encoding="utf-8"),
    )


def _unique_names(records: Sequence[RunRecord]) -> list[str]:
    """The runs' names; the folders where two have the same."""
    names = [record.name for record in records]
    if len(set(names)) == len(names):
        return names
    folders = [record.folder.name for record in records]
    if len(set(folders)) == len(folders):
        return folders
    return [str(record.folder) for record in records]


def _loss_rows(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    by_name = [{losses.name: losses for losses in record.losses} for record in records]
    for name in dict.fromkeys(name for sets in by_name for name in sets):
        first = by_name[0].get(name)
        cells = [format_loss(first.last) if first else MISSING]
        for record, sets in zip(records[1:], by_name[1:], strict=True):
            losses = sets.get(name)
            cells.append(_difference(name, records[0], first, record, losses))
        yield [name, *cells]


def _difference(
    name: str,
    first_run: RunRecord,
    first: HeldOutLosses | None,
    run: RunRecord,
    losses: HeldOutLosses | None,
) -> str:
    """A run's last loss, and how it differs from the first run's on the same rows."""
    if losses is None or losses.last is None:
        return MISSING
    if first is None or first.last is None:
        return format_loss(losses.last)
    prints = [(record.evaluation.get("sets") or {}).get(name) for record in (first_run, run)]
    if prints[0] != prints[1]:
        return f"{format_loss(losses.last)} (other rows)"
    change = losses.last - first.last
    text = f"{format_loss(losses.last)} ({change:+.3f}"
    before, after, items = _last_blocks(first), _last_blocks(losses), first.blocks.get("items")
    error = None
    if before and after and items is not None and items == losses.blocks.get("items"):
        error = paired_standard_error(before, after, items)
    if error is None:
        return f"{text})"
    verdict = ", noise" if abs(change) < CERTAIN * error else ""
    return f"{text} ± {error:.3f}{verdict})"


def _last_blocks(losses: HeldOutLosses) -> list[float]:
    measured = [model for model, value in losses.values.items() if value is not None]
    return losses.blocks.get(measured[-1], []) if measured else []


def _metric_rows(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    rows: dict[str, list[str]] = {}
    for number, record in enumerate(records):
        for name, metric, values in record.held_out_metrics:
            measured = [value for value in values.values() if value is not None]
            cells = rows.setdefault(f"{name} {metric}", [MISSING] * len(records))
            cells[number] = format_loss(measured[-1]) if measured else MISSING
    yield from ([name, *cells] for name, cells in rows.items())


def _score_rows(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    """The last model's scores, and how they differ from the first run's."""
    by_key = [{(row.name, row.metric): row for row in record.scores} for record in records]
    for key in dict.fromkeys(key for rows in by_key for key in rows):
        cells = [
            _score_text(key[0], records[0], by_key[0].get(key), record, rows.get(key))
            for record, rows in zip(records, by_key, strict=True)
        ]
        row = next(rows[key] for rows in by_key if key in rows)
        yield [row.title, *cells]


def _score_text(
    name: str,
    first_run: RunRecord,
    first_row: ScoreRow | None,
    run: RunRecord,
    row: ScoreRow | None,
) -> str:
    score, first = (None if x is None else x.last for x in (row, first_row))
    if score is None:
        return MISSING
    if first is None or run is first_run:
        return score.text()
    inputs = [(record.evaluation.get(INPUTS) or {}).get(name) for record in (first_run, run)]
    if inputs[0] != inputs[1]:
        return f"{score.text()} (other rows or settings)"
    verdict = ", noise" if score.rating(first) == "noise" else ""
    return f"{score.value:.3f} ({score.change_text(first)}{verdict})"


def _figure_rows(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    stages = dict.fromkeys(name for record in records for name in record.artifacts)
    for stage in stages:
        facts = [record.artifacts.get(stage, {}) for record in records]
        for title, key, text in (
            ("time", "seconds", duration),
            ("tokens/s", "tokens_per_second", "{:.0f}".format),
            ("peak memory", "peak_memory_bytes", size),
        ):
            cells = [
                text(f[key]) if isinstance(f.get(key), int | float) else MISSING for f in facts
            ]
            yield [f"{stage}, {title}", *cells]


def _key_rows(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    """The recipe's keys whose values differ."""
    recipes = [dict(_leaves(record.recipe)) for record in records]
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = [str(recipe[key]) if key in recipe else MISSING for recipe in recipes]
        if key not in UNCOMPARED and len(set(values)) > 1:
            yield [key, *values]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a recipe; entries of lists by their name, else by their number."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [
            (str(item.get("name", i)) if isinstance(item, dict) else str(i), item)
            for i, item in enumerate(value)
        ]
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else key)
