"""`dtrain run`: check, then become torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress
from dtrain.core.run_dir import LOCKED_BY_LAUNCHER, RunDir, create_numbered
from dtrain.launching.commands import (
    launcher_environment,
    torchrun_command,
)

if TYPE_CHECKING:
    from dtrain.config.schema import Recipe

Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start anew in a new folder beside the old one.")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Go on although this key changed; may be given again."),
]


def run(
    recipe: RecipeAddress,
    overrides: Overrides = None,
    fresh: Fresh = False,
    allow_change: AllowChange = None,
) -> None:
    """Train, here and now; run again, it goes on where it was."""
    from dtrain.config.load import dump, load_recipe
    from dtrain.planning.known_models import check_trainable

    settings = load_recipe(recipe, overrides or [])
    check_trainable(settings.model.base)
    folder = Path(settings.output.folder).expanduser().absolute()
    run_dir = create_numbered(folder) if fresh else RunDir(folder)
    settings = placed(settings, run_dir.path)
    lock = run_dir.lock(fix="wait for it, choose another output.folder, or add --fresh")
    run_dir.reset(dump(settings))
    ranks = settings.launch.processes
    if ranks == "auto" and settings.device == "cpu":
        ranks = 1
    command = torchrun_command(run_dir.recipe, ranks, allow_change or [])
    environment = launcher_environment(os.environ, settings.device)
    environment[LOCKED_BY_LAUNCHER] = str(run_dir.path)
    lock.keep_after_exec()
    # Becoming torchrun leaves nobody in between to lose a signal or an exit status.
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def placed(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the run folder as it will be."""
    output = recipe.output.model_copy(update={"folder": str(folder)})
    return recipe.model_copy(update={"output": output})
