"""A scan's report on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dtrain.core.units import count
from dtrain.data.show import printable

SHOWN_EXAMPLES = 2


def tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """The report, part by part."""
    for source in report["sources"]:
        yield f"{source['name']}: {source['rows']:,} rows ({source['format']})"
    if report["lengths"]:
        yield _lengths(report)
    yield _counts("languages", report["languages"])
    variety = report["variety"]
    if variety["questions"]:
        openings, questions = variety["distinct_openings"], variety["questions"]
        yield f"{questions:,} questions begin in {openings:,} ways"
        yield _counts("asked for", variety["orders"] or variety["openings"])
    if report["findings"]:
        yield _findings(report)
    yield Text("verdict", style="bold")
    for line in report["verdict"]:
        mark = "✗" if line["grave"] else "·"
        advice = f" → {line['do']}" if line["do"] else ""
        yield Text(f"{mark} {line['text']}{advice}", style="red" if line["grave"] else "")


def _lengths(report: dict[str, Any]) -> Table:
    table = Table("length", box=None, pad_edge=False)
    for name in ("median", "p90", "p99", "longest", "sum"):
        table.add_column(name, justify="right")
    for name, spread in report["lengths"].items():
        numbers = [f"{spread[key]:,}" for key in ("median", "p90", "p99", "longest")]
        table.add_row(name, *numbers, count(spread["sum"]))
    return table


def _counts(title: str, counts: list[Any]) -> Text:
    listed = ", ".join(f"{name} {number:,}" for name, number in counts)
    return Text(f"{title}: {listed or 'none'}")


def _findings(report: dict[str, Any]) -> Table:
    table = Table("found", box=None, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("worst examples", overflow="fold")
    for one in report["findings"]:
        shown = one["examples"][:SHOWN_EXAMPLES]
        examples = [_example(**example) for example in shown]
        style = "red" if one["grave"] else ""
        cells = (one["title"], f"{one['rows']:,}", f"{one['share']:.1%}", "\n".join(examples))
        table.add_row(*(Text(printable(cell), style=style) for cell in cells))
    return table


def _example(place: str, note: str, **_: str) -> str:
    """Where and what, without the folder."""
    folder = place[: place.rfind("/") + 1]
    return f"{place} {note}".replace(folder, "").strip() if folder else f"{place} {note}".strip()
