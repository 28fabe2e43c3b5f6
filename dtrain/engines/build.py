"""From the recipe's `engine.kind` to an engine."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.distributed.world import World
from dtrain.engines.base import Engine, Fill

# By name, so that a run under ddp does not pay for importing DeepSpeed.
ENGINES = {
    "strict": ("dtrain.engines.strict", "StrictDdp"),
    "ddp": ("dtrain.engines.ddp", "Ddp"),
    "fsdp2": ("dtrain.engines.fsdp2", "Fsdp2"),
    "zero2": ("dtrain.engines.deepspeed", "Zero2"),
    "zero3": ("dtrain.engines.deepspeed", "Zero3"),
}


SHARDING = ("fsdp2", "zero3")  # what keeps a share of the base only, and so takes it in blocks


def build_engine(
    model: nn.Module, recipe: Recipe, stage: Stage, world: World, fill: Fill
) -> Engine:
    """Wrap `model` in the engine that the resolved recipe names.

    Args:
        fill: gives blocks of the model their values, if it has none yet.

    Raises:
        UserError: the ranks do not fit the engine, or strict sums are asked of one without them.
    """
    kind: str = recipe.engine.kind
    if stage.train.optimizer != "adamw" and kind != "ddp":
        raise UserError(
            f"{stage.train.optimizer} keeps its state in blocks that {kind} would cut up",
            where="train.optimizer, engine.kind",
            fix="train.optimizer=adamw, or engine.kind=ddp",
        )
    if recipe.determinism == "strict":
        if kind != "ddp":
            raise UserError(
                f"strict is for ddp; {kind} sums gradients in an order of its own",
                where="determinism, engine.kind",
                fix="engine.kind=ddp, or determinism=off",
            )
        kind = "strict"
    module, name = ENGINES[kind]
    engine: Engine = getattr(import_module(module), name)(model, recipe, stage, world, fill)
    return engine
