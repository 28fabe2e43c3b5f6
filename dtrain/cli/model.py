"""`dtrain model`: creates sample models and data."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Sample models and data.", no_args_is_help=True)


@app.callback()
def model() -> None:
    """Sample models and data."""


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="For example smollm2-135m.")]) -> None:
    """Create a sample in the cache folder, and print its path."""
    from dtrain.samples import ensure

    print(ensure(name))
