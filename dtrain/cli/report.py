"""`dtrain report`: what a run did, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.errors import UserError


def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write RUN/report.html, and print where it lies."""
    if not (run / "recipe.yaml").is_file():
        fix = "give the folder that output.folder named"
        raise UserError("is not a run folder: no recipe.yaml in it", where=str(run), fix=fix)
    from dtrain.monitoring.report import write_report

    print(write_report(run))
