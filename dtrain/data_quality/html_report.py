"""A scan's report as one HTML page that needs nothing beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dtrain.core.files import write_atomic
from dtrain.core.units import count

TEMPLATE = Path(__file__).with_name("html_report.html.jinja")


def write_page(path: Path, report: dict[str, Any], title: str) -> None:
    """Write the page; all text in it is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": count, "thousands": lambda n: f"{n:,}"}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    grave = sum(line["grave"] for line in report["verdict"])
    write_atomic(path, template.render(report=report, title=title, grave=grave) + "\n")
