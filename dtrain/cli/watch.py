"""`dtrain watch`: what runs are doing, live or once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import path
from dtrain.core.errors import UserError

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", parser=path, help="Run folders.")]
Once = Annotated[bool, typer.Option("--once", help="Print the state and end; so does a pipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print the state as JSON, a line a run.")]


def watch(runs: Runs, once: Once = False, as_json: Json = False) -> None:
    """Show steps, losses, time left and alerts of runs; reads their files only."""
    from dtrain.core.log import SafeConsole
    from dtrain.monitoring.watch import read_states, render_run

    if as_json:
        for state in read_states(runs):
            print(json.dumps(state.to_json()))
    elif once or not sys.stdout.isatty():
        for state in read_states(runs):
            SafeConsole().print(render_run(state))
    else:
        try:
            from dtrain.monitoring.watch_app import WatchApp
        except ImportError as error:
            fix = "pip install 'dtrain[watch]', or use --once"
            raise UserError("the live view needs textual", fix=fix) from error
        WatchApp(runs).run()
