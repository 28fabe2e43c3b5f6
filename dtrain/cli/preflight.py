"""`dtrain preflight`: look at the nodes of this allocation."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress
from dtrain.core.errors import Exit


def preflight(recipe: RecipeAddress, overrides: Overrides = None) -> None:
    """Look at every node of this allocation (salloc, sbatch): the machines, links, sums."""
    from dtrain.cli.run import placed
    from dtrain.config.load import dump, load_recipe
    from dtrain.core.files import write_atomic
    from dtrain.core.run_dir import RunDir
    from dtrain.launching.preflight import preflight as look

    settings = load_recipe(recipe, overrides or [])
    run = Path(settings.output.folder).expanduser().absolute()
    run_dir = RunDir(run)
    write_atomic(run_dir.submitted_recipe, dump(placed(settings, run)))
    if look(run_dir.submitted_recipe, run_dir.slurm, os.environ):
        raise typer.Exit(Exit.CRASHED)
