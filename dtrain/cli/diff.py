"""`dtrain diff`: what became of a model's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.units import count

ROW = "{:>9} {:>10} {:>10} {:>10}  {}"


def diff(
    old: Annotated[Path, typer.Argument(help="A folder of a model or an adapter.")],
    new: Annotated[Path, typer.Argument(help="Another one.")],
    top: Annotated[int, typer.Option(min=0, help="Tensors to list; 0: all.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it here.")] = None,
) -> None:
    """List the tensors that differ, the greatest relative change first."""
    from dtrain.core.files import write_json
    from dtrain.merge.verify import as_json, elements, overall
    from dtrain.merge.verify import diff as compare

    found = compare(old, new)
    if found.changes:
        print(ROW.format("relative", "|new-old|", "|old|", "greatest", "tensor"))
    for one in found.changes[: top or None]:
        numbers = [f"{x:.3g}" for x in (one.relative, one.difference, one.old, one.greatest)]
        print(ROW.format(*numbers, f"{one.name} {list(one.shape)}"))
    if top and len(found.changes) > top:
        print(f"{'…':>9} {len(found.changes) - top} more (--top 0 lists all)")
    for word in found.unlike:
        print(word)
    print(
        f"{len(found.changes)} tensors changed ({count(elements(found))} elements, relative change "
        f"{overall(found):.3g}), {found.same} are equal, {len(found.unlike)} cannot be compared"
    )
    if json_file:
        write_json(json_file, as_json(found))
