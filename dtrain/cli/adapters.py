"""`dtrain adapters` and `dtrain combine`: lists adapters, and combines two into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def adapters(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|FOLDER", help="A run folder, or a folder with adapters.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List adapters: their stage, method, rank, layers, size and base."""
    from dtrain.serving.adapter_list import format_table, list_adapters

    adapters = list_adapters(folder.expanduser())
    if as_json:
        print(json.dumps([adapter.as_json() for adapter in adapters], indent=2))
    elif adapters:
        print(format_table(adapters))
    else:
        print("no adapters")


def combine(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter.")],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="An adapter of the same base, or trained after A.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Truncate to this rank and print the error (default: exact)."),
    ] = None,
) -> None:
    """Combine two adapters into one with the effect of both, to serve them without a merge."""
    from dtrain.core.units import size
    from dtrain.merge.combine_adapters import combine_adapters

    result = combine_adapters(first.expanduser(), second.expanduser(), out.expanduser(), rank=rank)
    error = "exact" if rank is None else f"relative error {result.error:.2e}"
    bytes_written = size(result.size_bytes)
    print(f"{out}: rank {result.rank}, {error}, {bytes_written}, of base {result.base}")
