"""`dtrain check`: print a recipe with its defaults, or all its errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli.arguments import Overrides, RecipeAddress
from dtrain.core.errors import UserError

if TYPE_CHECKING:
    from dtrain.config.schema import Recipe


def check(recipe: RecipeAddress, overrides: Overrides = None) -> None:
    """Print a recipe with all defaults, or all its errors."""
    from dtrain.config.load import dump, load_recipe
    from dtrain.planning.known_models import check_trainable, position_warnings

    settings = load_recipe(recipe, overrides or [])
    check_trainable(settings.model.base)
    for line in position_warnings(settings):
        print(f"warning: {line}", file=sys.stderr)
    print(dump(settings), end="")
    for note in template_notes(settings):
        print(note, file=sys.stderr)


def template_notes(recipe: Recipe) -> Iterator[str]:
    """Warnings about stages whose chat template does not end a turn."""
    from dtrain.config.objectives import OBJECTIVES
    from dtrain.data.light_template import closes_turns
    from dtrain.planning.known_models import find_config

    try:
        config = Path(
            find_config(recipe.model.base)[1]
        )  # or a description, if the base is not on this machine
        base = config.parent if config.is_file() else None
    except UserError:
        base = None
    for stage in recipe.stages:
        if OBJECTIVES[stage.kind].trains_on_answers:
            closes = closes_turns(stage.data.template, base)
            where = f"stages.{stage.name}.data.template: {stage.data.template}"
            if closes is None:
                yield f"{where}: not checked here; `dtrain data scan` checks it"
            elif not closes:
                yield (
                    f"warning: {where}: the end of a turn has no loss: "
                    "the model will not learn to stop"
                )
