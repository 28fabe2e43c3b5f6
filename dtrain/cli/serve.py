"""`dtrain serve`: prints the commands that serve a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.errors import UserError


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    write: Annotated[bool, typer.Option("--print", help="Print the commands.")] = False,
) -> None:
    """Print the vLLM commands for the merged model and the adapters, and what vLLM refuses."""
    if not write:
        message = "dtrain prints server commands, and does not run them"
        raise UserError(message, where="serve", fix=f"dtrain serve {run} --print")
    from dtrain.serving.run_models import open_run
    from dtrain.serving.vllm import script

    print(script(open_run(run.expanduser())), end="")
