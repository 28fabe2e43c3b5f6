"""Arguments of several commands."""

from __future__ import annotations

from typing import Annotated

import typer

from dtrain.cli import completion

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
