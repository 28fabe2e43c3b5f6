"""Build the engine that a recipe names."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from dtrain.config.checks import unsupported_by_engine
from dtrain.config.engines import ENGINES
from dtrain.config.schema import Recipe, Stage
from dtrain.distributed.world import World
from dtrain.engines.base import Engine, MaterializeFn


def build_engine(
    model: nn.Module, recipe: Recipe, stage: Stage, world: World, materialize: MaterializeFn
) -> Engine:
    """Wrap `model` in the engine that the resolved recipe names.

    Args:
        materialize: loads blocks of the model that have no storage yet.

    Raises:
        UserError: the engine does not support what the recipe asks for, or the number of ranks.
    """
    for clash in unsupported_by_engine(recipe):  # a launcher may have chosen the engine
        raise clash
    capabilities = ENGINES[recipe.engine.kind]
    path = capabilities.implementation
    if recipe.determinism == "strict":
        assert capabilities.strict_implementation
        path = capabilities.strict_implementation
    # Imported by name, so that a run under ddp does not pay for importing DeepSpeed.
    module, _, name = path.partition(":")
    engine: Engine = getattr(import_module(module), name)(model, recipe, stage, world, materialize)
    return engine
