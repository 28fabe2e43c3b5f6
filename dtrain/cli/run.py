"""`dtrain run`: check, then become torchrun."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress
from dtrain.core.run_dir import LOCKED_BY_LAUNCHER, create_numbered
from dtrain.launching.commands import (
    launcher_environment,
    torchrun_command,
)

Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start again in a new folder next to the old one.")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Resume although this key changed; may be repeated."),
]


def run(
    recipe: RecipeAddress,
    overrides: Overrides = None,
    fresh: Fresh = False,
    allow_change: AllowChange = None,
) -> None:
    """Train on this machine; run it again to resume."""
    from dtrain.config.load import dump, load_recipe
    from dtrain.launching.layout import ranks_per_node, run_dir_of, with_run_dir
    from dtrain.planning.known_models import check_trainable

    settings = load_recipe(recipe, overrides or [])
    check_trainable(settings.model.base)
    run_dir = run_dir_of(settings)
    if fresh:
        run_dir = create_numbered(run_dir.path)
    settings = with_run_dir(settings, run_dir)
    lock = run_dir.lock(fix="wait for it, choose another output.folder, or add --fresh")
    run_dir.reset(dump(settings))
    command = torchrun_command(run_dir.recipe, ranks_per_node(settings, 0), allow_change or [])
    environment = launcher_environment(os.environ, settings.device)
    environment[LOCKED_BY_LAUNCHER] = str(run_dir.path)
    lock.keep_after_exec()
    # Becoming torchrun leaves no process in between that could lose a signal or an exit status.
    sys.stdout.flush()
    os.execve(command[0], command, environment)
