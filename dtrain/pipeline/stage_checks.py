"""Check every stage on its model, built without weights, before the first stage trains.

`input_checks` finds what can be found without torch. Here each method is attached on the meta
device, as it will be when its stage starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dtrain.config.methods.patterns import check_parameter_patterns
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.merge.merge import check_mergeable
from dtrain.methods.base import build_method
from dtrain.methods.new_tokens import check_new_tokens
from dtrain.models.load import resolve_dtype, silence_transformers
from dtrain.models.sharded_loading import stream_base
from dtrain.objectives.regularizers.fisher import penalized_layers
from dtrain.pipeline.initial_adapter import check_initial_adapter

CPU, META = torch.device("cpu"), torch.device("meta")
WHERE = "train.learning_rate_scales"


def check_stages(
    recipe: Recipe, base: Path, device: torch.device = CPU, new_tokens: Sequence[int] = ()
) -> None:
    """Check that every stage's method fits the base, and that its result can be merged.

    Stages after the first start from a merged model with the same modules and tensors as the base.

    Args:
        base: folder of the base.
        device: that the stages train on, as `dtype: auto` depends on it.
        new_tokens: numbers of the tokens that the recipe adds to its base.

    Raises:
        UserError: a stage could not start, or could not end.
    """
    done = list[Stage]()
    for stage in recipe.stages:
        if not any(_is_same(recipe, stage, other) for other in done):
            try:
                with silence_transformers():
                    _check_stage(recipe, stage, base, device, new_tokens)
            except UserError as error:
                is_key = error.where.startswith(("method.", "train.", "regularize."))
                joint = "." if is_key else ": "
                where = f"stages.{stage.name}{joint}{error.where}"
                raise UserError(error.message, where=where, fix=error.fix) from error
        done.append(stage)


def _is_same(recipe: Recipe, stage: Stage, other: Stage) -> bool:
    """Whether what is checked of two stages is the same."""
    scales = stage.train.learning_rate_scales == other.train.learning_rate_scales
    settings = stage.method == other.method and stage.regularize == other.regularize
    return scales and settings and recipe.merges(stage) == recipe.merges(other)


def _check_stage(
    recipe: Recipe, stage: Stage, base: Path, device: torch.device, new_tokens: Sequence[int]
) -> None:
    method = build_method(stage.method, new_tokens)
    streamed = stream_base(
        base,
        recipe.model.model_copy(update={"attention": "auto", "gradient_checkpointing": False}),
        quantized=method.traits.quantizes_base,
        dtype=method.base_dtype(resolve_dtype(recipe.model.dtype, device)),
        device=CPU,
    )
    model = method.attach(streamed.model, seed=0, device=META)
    if new_tokens:
        check_new_tokens(model)
    check_rate_scales(stage, model)
    if recipe.merges(stage):
        check_mergeable(base, method.changed_tensors(model))
    check_initial_adapter(stage, model)
    term = stage.regularize
    if term and term.traits.penalizes_change and method.traits.adds_product:
        penalized_layers(model)


def check_rate_scales(stage: Stage, model: nn.Module) -> None:
    """Check that each pattern of `train.learning_rate_scales` matches a parameter that trains.

    Raises:
        UserError: one has no effect.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    check_parameter_patterns(stage.train.learning_rate_scales, names, WHERE)
