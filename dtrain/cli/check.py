"""`dtrain check`: the recipe as it would run, or every error in it."""

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
    """Print the recipe with every default filled in, or every error in it."""
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
    """What is wrong with how the chat templates of the stages end a turn, as far as seen here."""
    from dtrain.config.objectives import OBJECTIVES
    from dtrain.data.light_template import closes_turns
    from dtrain.planning.known_models import find_config

    try:
        config = Path(find_config(recipe.model.base)[1])  # or words, of a base that is not here
        base = config.parent if config.is_file() else None
    except UserError:
        base = None
    for stage in recipe.stages:
        if OBJECTIVES[stage.kind].trains_on_answers:
            closes = closes_turns(stage.data.template, base)
            where = f"stages.{stage.name}.data.template: {stage.data.template}"
            if closes is None:
                yield f"{where}: not looked at here; `dtrain data scan` looks at it"
            elif not closes:
                yield (
                    f"warning: {where}: nothing that ends a turn is learned: the model will not "
                    "learn to stop"
                )
