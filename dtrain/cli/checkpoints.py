"""`dtrain checkpoints`: what a run could go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.errors import Exit
from dtrain.core.run_dir import CHECKPOINTS, RunDir
from dtrain.core.units import size

COLUMNS = "{:<16} {:>8} {:>14} {:>10}  {:<9} {}"


def checkpoints(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again.")] = False,
) -> None:
    """List a run's checkpoints; --verify exits with 2 if one of them is not what was written."""
    RunDir(run).check_exists()
    from dtrain.checkpoints import list_checkpoints

    print(COLUMNS.format("stage", "step", "held-out loss", "size", "complete", "verified"))
    broken = 0
    for folder in sorted(run.glob(f"*/{CHECKPOINTS}"), key=lambda path: path.stat().st_ctime):
        for one in list_checkpoints(folder, verify=verify):
            loss = "-" if one.loss is None else f"{one.loss:.4f}"
            complete = "yes" if one.complete else "no"
            verified = {None: "-", True: "yes", False: "no"}[one.verified]
            row = (folder.parent.name, one.step, loss, size(one.size), complete, verified)
            print(COLUMNS.format(*row).rstrip())
            if one.problem:
                print(f"    {one.problem}")
            broken += verify and not one.verified
    raise typer.Exit(Exit.USER_ERROR if broken else Exit.FINISHED)
