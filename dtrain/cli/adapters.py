"""`dtrain adapters` and `dtrain combine`: what adapters there are, and one out of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def adapters(
    folder: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="Where they lie.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List adapters: their base, rank, layers, stage and size."""
    from dtrain.serving.adapter_list import list_adapters, table

    found = list_adapters(folder.expanduser())
    if as_json:
        print(json.dumps([adapter.as_json() for adapter in found], indent=2))
    elif found:
        print(table(found))
    else:
        print("none")


def combine(
    first: Annotated[Path, typer.Argument(metavar="A", help="Adapter of the base.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Adapter of base + A, or of base.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Made.")],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Cut to this rank, and say the error; exact if not given."),
    ] = None,
) -> None:
    """Make one adapter that changes the base as A and then B do, to serve both without a merge."""
    from dtrain.core.units import size
    from dtrain.merge.combine_adapters import stack

    made = stack(first.expanduser(), second.expanduser(), out.expanduser(), rank=rank)
    error = "exact" if rank is None else f"relative error {made.error:.2e}"
    print(f"{out}: rank {made.rank}, {error}, {size(made.size_bytes)}, of base {made.base}")
