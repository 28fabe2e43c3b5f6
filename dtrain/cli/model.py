"""`dtrain model`: the models and data that dtrain makes on the spot."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Sample models and data.", no_args_is_help=True)


@app.callback()
def model() -> None:
    """Sample models and data."""


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="For example smollm2-135m.")]) -> None:
    """Make a sample in the cache folder, once, and print where it lies."""
    from dtrain.samples import ensure

    print(ensure(name))
