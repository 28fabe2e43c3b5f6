"""`dtrain verify`: is a model what was written, and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.errors import Exit
from dtrain.core.units import size


def verify(
    model: Annotated[Path, typer.Argument(help="A folder of a model or an adapter.")],
) -> None:
    """Hash every file of a merged model and look for NaN and infinity; exits with 2 if one is off.

    A model that dtrain did not write carries no hashes: of that one, only the values are checked.
    """
    from dtrain.merge.verify import verify as look

    found = look(model)
    for problem in found.problems:
        print(problem)
    hashed = f"{found.hashed} files hashed" if found.hashed else "no merge.json, so no hash checked"
    bad = f"{len(found.problems)} problems" if found.problems else "all finite"
    print(f"{model}: {found.tensors} tensors, {size(found.bytes)}, {hashed}, {bad}")
    raise typer.Exit(Exit.USER_ERROR if found.problems else Exit.FINISHED)
