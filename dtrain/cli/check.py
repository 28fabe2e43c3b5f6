"""`dtrain check`: the recipe as it would run, or every error in it."""

from __future__ import annotations

import sys

from dtrain.cli.arguments import Overrides, RecipeAddress


def check(recipe: RecipeAddress, overrides: Overrides = None) -> None:
    """Print the recipe with every default filled in, or every error in it."""
    from dtrain.config.load import dump, load_recipe
    from dtrain.planning.bases import refuse_untrainable
    from dtrain.planning.positions import position_warnings

    settings = load_recipe(recipe, overrides or [])
    refuse_untrainable(settings.model.base)
    for line in position_warnings(settings):
        print(f"warning: {line}", file=sys.stderr)
    print(dump(settings), end="")
