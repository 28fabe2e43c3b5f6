"""`dtrain run`: check, then become torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress
from dtrain.core.errors import UserError
from dtrain.core.files import FolderLock, write_atomic
from dtrain.launching.commands import (
    LOCKED_BY_LAUNCHER,
    STOP_FILE,
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
    from dtrain.config.load import load_recipe
    from dtrain.planning.known_models import check_trainable

    settings = load_recipe(recipe, overrides or [])
    check_trainable(settings.model.base)
    folder = Path(settings.output.folder).expanduser().absolute()
    if fresh:
        folder = free_folder(folder)
    settings = placed(settings, folder)
    lock = take_folder(folder, settings)
    ranks = settings.launch.processes
    if ranks == "auto" and settings.device == "cpu":
        ranks = 1
    command = torchrun_command(folder / "recipe.yaml", ranks, allow_change or [])
    environment = launcher_environment(os.environ, settings.device)
    environment[LOCKED_BY_LAUNCHER] = str(folder)
    lock.keep_after_exec()
    # Becoming torchrun leaves nobody in between to lose a signal or an exit status.
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, … that is not there yet; made."""
    number = 1
    while True:
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _unusable(candidate, error) from error
        else:
            return candidate


def placed(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the run folder as it will be."""
    output = recipe.output.model_copy(update={"folder": str(folder)})
    return recipe.model_copy(update={"output": output})


def take_folder(folder: Path, recipe: Recipe) -> FolderLock:
    """Lock the run folder, and write the resolved recipe into it.

    Raises:
        UserError: the folder cannot be used, or another run is using it.
    """
    from dtrain.config.load import dump

    lock = FolderLock(folder)
    try:
        if not lock.acquire():
            what = f"another run is using this folder ({lock.holder()})"
            fix = "wait for it, choose another output.folder, or add --fresh"
            raise UserError(what, where=str(folder), fix=fix)
        (folder / STOP_FILE).unlink(missing_ok=True)  # it was for the run before
        write_atomic(folder / "recipe.yaml", dump(recipe))
    except OSError as error:
        raise _unusable(folder, error) from error
    return lock


def _unusable(folder: Path, error: OSError) -> UserError:
    what = f"cannot be used as the run folder: {error.strerror or error}"
    return UserError(what, where=str(folder), fix="choose another output.folder")
