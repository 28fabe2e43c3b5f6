"""`dtrain report`: a run's results as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.run_dir import RunDir


def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write RUN/report.html and print its path."""
    RunDir(run).check_exists()
    from dtrain.monitoring.report import write_report

    print(write_report(run))
