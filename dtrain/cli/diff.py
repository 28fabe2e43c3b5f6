"""`dtrain diff`: compares the tensors of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.units import count

ROW = "{:>9} {:>10} {:>10} {:>10}  {}"


def diff(
    old: Annotated[Path, typer.Argument(help="Folder of a model or an adapter.")],
    new: Annotated[Path, typer.Argument(help="Folder of the one to compare with it.")],
    top: Annotated[int, typer.Option(min=0, help="Number of tensors to list; 0: all.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all changes to this file.")
    ] = None,
) -> None:
    """List the tensors that differ, the largest relative change first."""
    from dtrain.core.files import write_json
    from dtrain.merge.diff import diff_models

    result = diff_models(old, new)
    if result.changes:
        print(ROW.format("relative", "|new-old|", "|old|", "greatest", "tensor"))
    for change in result.changes[: top or None]:
        values = (change.relative, change.difference_norm, change.old_norm, change.greatest)
        print(ROW.format(*(f"{x:.3g}" for x in values), f"{change.name} {list(change.shape)}"))
    if top and len(result.changes) > top:
        print(f"{'…':>9} {len(result.changes) - top} more (--top 0 lists all)")
    for sentence in result.incomparable:
        print(sentence)
    print(
        f"{len(result.changes)} tensors changed ({count(result.changed_elements)} elements, "
        f"relative change {result.relative:.3g}), {result.equal} are equal, "
        f"{len(result.incomparable)} cannot be compared"
    )
    if json_file:
        write_json(json_file, result.as_json())
