"""`dtrain check`: the recipe as it would run, or every error in it."""

from __future__ import annotations

from dtrain.cli.arguments import Overrides, RecipeAddress


def check(recipe: RecipeAddress, overrides: Overrides = None) -> None:
    """Print the recipe with every default filled in, or every error in it."""
    from dtrain.config.load import dump, load_recipe
    from dtrain.planning.bases import refuse_untrainable

    settings = load_recipe(recipe, overrides or [])
    refuse_untrainable(settings.model.base)
    print(dump(settings), end="")
