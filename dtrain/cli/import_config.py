"""`dtrain import`: a recipe from the config file of another tool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import path
from dtrain.core.errors import Exit, UserError
from dtrain.core.output import wrapped

Config = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", parser=path, help="A file of axolotl, LLaMA-Factory or TRL."),
]
Out = Annotated[
    Path | None, typer.Argument(parser=path, help="The recipe; default: CONFIG's name-dtrain.yaml.")
]
Processes = Annotated[
    int, typer.Option(min=1, help="Ranks that train; they multiply the batch, as there.")
]


def import_config(config: Config, out: Out = None, processes: Processes = 1) -> None:
    """Write a recipe from the config of another tool, and say what became of each key."""
    from dtrain.importing.import_config import import_config, recipe_text, report

    imported = import_config(config, processes)
    target = out or Path(f"{config.stem}-dtrain.yaml")
    write_new(target, recipe_text(imported))
    print(f"{config} is a config of {imported.tool}")
    for line in report(imported):
        print(wrapped(line, sys.stdout))
    print(f"wrote {target}; next: dtrain check {target}")
    raise typer.Exit(check_written(target))


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        UserError: it exists, or cannot be written.
    """
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError("exists already", where=str(path), fix="choose another file") from error
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from error


def check_written(path: Path) -> Exit:
    """Print what `dtrain check` would refuse."""
    from dtrain.config.load import load_recipe
    from dtrain.pipeline.input_checks import check_inputs

    try:
        check_inputs(load_recipe(str(path))).raise_errors()
    except UserError as error:
        print(f"error: to correct in it:\n{error}", file=sys.stderr)
        return error.status
    return Exit.FINISHED
