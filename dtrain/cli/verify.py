"""`dtrain verify`: checks that a model is unchanged and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.core.errors import Exit
from dtrain.core.units import size


def verify(
    model: Annotated[Path, typer.Argument(help="Folder of a model or an adapter.")],
) -> None:
    """Check a model's hashes, and look for NaN and infinity; exit status 2 if there is a problem.

    A model that dtrain did not write has no hashes: only its values are checked.
    """
    from dtrain.merge.verify import verify_model

    report = verify_model(model)
    for problem in report.problems:
        print(problem)
    hashed = f"{report.hashed} files hashed" if report.hashed else "no merge.json, no hash checked"
    result = f"{len(report.problems)} problems" if report.problems else "all finite"
    print(f"{model}: {report.tensors} tensors, {size(report.bytes)}, {hashed}, {result}")
    raise typer.Exit(Exit.USER_ERROR if report.problems else Exit.FINISHED)
