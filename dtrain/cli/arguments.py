"""Arguments that several verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeAddress = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys to change, for example engine.kind=zero3."),
]
