"""Arguments of several commands."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeAddress = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys to override, such as engine.kind=zero3."),
]
