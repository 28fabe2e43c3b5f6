"""`dtrain preflight`: check the nodes of this allocation."""

from __future__ import annotations

import os

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress
from dtrain.core.errors import Exit


def preflight(recipe: RecipeAddress, overrides: Overrides = None) -> None:
    """Check every node of this allocation (salloc, sbatch): machine, links, all-reduce."""
    from dtrain.config.load import dump, load_recipe
    from dtrain.core.files import write_atomic
    from dtrain.launching.layout import run_dir_of, with_run_dir
    from dtrain.launching.preflight import check_allocation
    from dtrain.launching.slurm import current_allocation

    settings = load_recipe(recipe, overrides or [])
    run, allocation = run_dir_of(settings), current_allocation(os.environ)
    write_atomic(run.submitted_recipe, dump(with_run_dir(settings, run)))
    if check_allocation(settings, run.submitted_recipe, run.slurm, allocation):
        raise typer.Exit(Exit.CRASHED)
