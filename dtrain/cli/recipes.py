"""`dtrain recipes`: list and copy the shipped recipes."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Annotated

import typer

from dtrain.core.errors import UserError
from dtrain.recipes import FOLDER, shipped, summary

app = typer.Typer(help="List the shipped recipes, or copy one to edit.")


@app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes, or copy one to edit."""
    if context.invoked_subcommand:
        return
    wide = max(map(len, shipped())) + 2
    for name, path in shipped().items():
        print(fill(f"{name:<{wide}}{summary(path)}", 100, subsequent_indent=" " * wide))
    print(f"\ndtrain recipes copy NAME [PATH] copies one to edit; all keys: {FOLDER}/README.md")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    path: Annotated[Path | None, typer.Argument(help="Target; default: NAME.yaml.")] = None,
) -> None:
    """Copy a shipped recipe to a new file."""
    known = shipped()
    if name not in known:
        fix = f"use one of {', '.join(known)}"
        raise UserError("no such shipped recipe", where=name, fix=fix)
    target = path or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(known[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UserError("exists already", where=str(target), fix="choose another file") from error
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(target)) from error
    print(f"wrote {target}; edit it, then: dtrain run {target}")
