"""`dtrain report`: what a run did, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.run_dir import RunDir


def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write RUN/report.html, and print where it lies."""
    RunDir(run).check_exists()
    from dtrain.monitoring.report import write_report

    print(write_report(run))
