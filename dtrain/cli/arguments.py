"""Arguments of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli import completion
from dtrain.core.cache_paths import user_path


def path(text: str) -> Path:
    """The path that an argument gives; help shows the function's name.

    Raises:
        UserError: no file can have it.
    """
    return user_path(text)


def address(text: str) -> str:
    """A file, a folder, a glob or an address, as it was given; help shows the function's name.

    Raises:
        UserError: it is a path that no file can have, or contains a secret.
    """
    user_path(text)
    return text


RecipeAddress = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped recipe.",
        autocompletion=completion.recipe_addresses,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Keys to override, such as engine.kind=zero3.",
        autocompletion=completion.overrides,
    ),
]
Price = Annotated[
    float | None, typer.Option(min=0, help="Price of an hour of one GPU, for the cost of the run.")
]
