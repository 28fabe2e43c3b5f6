"""Checks of the terms against forgetting, with the method and the rows that they need."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.config.clash import Clash
from dtrain.config.methods import TRAITS
from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import Key


def check_regularize(recipe: Recipe, number: int, at: Key) -> Iterator[Clash]:
    """Errors in the term against forgetting of a stage.

    Args:
        number: of the stage.
        at: its key.
    """
    stage = recipe.stages[number]
    term, kind = stage.regularize, (*at, "regularize", "kind")
    if term is None:
        return
    traits = stage.method.traits
    if term.traits.penalizes_change and not (traits.adds_product or traits.trains_base):
        able = [name for name, t in TRAITS.items() if t.adds_product or t.trains_base]
        message = f"{term.kind} penalizes the change of whole weights or the product of two "
        message += f"matrices, and {stage.method.kind} trains neither"
        yield Clash([kind, (*at, "method", "kind")], message, f"method.kind={' or '.join(able)}")
    if term.traits.penalizes_change and traits.trains_base and recipe.engine.offload:
        message = f"{term.kind} changes the gradient, whose norm DeepSpeed has taken before it is "
        message += "offloaded"
        yield Clash([kind, ("engine", "offload")], message, "engine.offload=false")
    adapter = stage.method.adapter
    if term.traits.penalizes_change and adapter and adapter.trains_whole_modules:
        key = "modules_to_save" if adapter.whole_modules else "router"
        saved: Key = (*at, "method", key)
        message = f"{term.kind} does not hold modules that train whole"
        fix = f"remove {key}, or use kind=kl_to_base"
        yield Clash([kind, saved], message, fix)
    if term.traits.needs_base and not stage.method.traits.base_when_disabled:
        kinds = " or ".join(kind for kind, traits in TRAITS.items() if traits.base_when_disabled)
        message = f"{stage.method.kind} does not keep the model that the stage starts from"
        fix = f"method.kind={kinds}"
        yield Clash([kind, (*at, "method", "kind")], message, fix)
    if adapter is not None and adapter.initial_adapter is not None:
        message = "the term compares with the base, and the stage starts from base and adapter"
        fix = "merge that adapter first, and start a new one"
        yield Clash([kind, (*at, "method", "from_adapter")], message, fix)
    rows: Key = (*at, "regularize", "on")
    if term.reads_replay and stage.data.replay is None:
        fix = "add data.replay with rows that the model shall not forget"
        yield Clash([rows, (*at, "data", "replay")], "there are no rows of replay", fix)
    if term.reads_previous_stage and recipe.parent_of(stage) is None:
        yield Clash([rows], "this is the first stage", "on=replay, with rows in data.replay")
