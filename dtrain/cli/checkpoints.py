"""`dtrain checkpoints`: lists the checkpoints that a run can resume from."""

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
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file.")] = False,
) -> None:
    """List a run's checkpoints; with --verify, exit status 2 if one is damaged or incomplete."""
    RunDir(run).check_exists()
    from dtrain.checkpoints import list_checkpoints

    print(COLUMNS.format("stage", "step", "held-out loss", "size", "complete", "verified"))
    broken = 0
    for folder in sorted(run.glob(f"*/{CHECKPOINTS}"), key=lambda path: path.stat().st_ctime):
        for info in list_checkpoints(folder, verify=verify):
            loss = "-" if info.loss is None else f"{info.loss:.4f}"
            complete = "yes" if info.complete else "no"
            verified = {None: "-", True: "yes", False: "no"}[info.verified]
            row = (folder.parent.name, info.step, loss, size(info.size), complete, verified)
            print(COLUMNS.format(*row).rstrip())
            if info.problem:
                print(f"    {info.problem}")
            broken += verify and not info.verified
    raise typer.Exit(Exit.USER_ERROR if broken else Exit.FINISHED)
