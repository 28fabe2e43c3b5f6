"""What the verbs that look at data need of a recipe: its tokenizer, and one stage's rows."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from dtrain.config.schema import Recipe, Stage
from dtrain.core.folders import cache_folder
from dtrain.data.prepare import Mixture, prepare
from dtrain.models.resolve import base_folder
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from dtrain.pipeline.inputs import samples_of
from dtrain.samples.make import ensure


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer; the recipe's samples are made first.

    Raises:
        UserError: the base cannot be had.
    """
    for name in sorted(samples_of(recipe)):
        ensure(name)
    return load_tokenizer(base_folder(recipe.model.base), recipe.model.trust_remote_code)


def stage_mixture(recipe: Recipe, stage: Stage) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """A stage's prepared data, as training opens it.

    Raises:
        UserError: base or data cannot be used.
    """
    tokenizer = recipe_tokenizer(recipe)
    mark = tokenizer_fingerprint(tokenizer)
    return prepare(stage.data, stage.kind, tokenizer, mark, cache_folder() / "stores"), tokenizer
