"""Ranks that build an engine; prints how much of what was filled the engine did not let go of."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import torch
from torch import nn

from dtrain.config.engines import ENGINES
from dtrain.config.load import load_recipe
from dtrain.core.cache_paths import sample_name
from dtrain.distributed.world import World, end_world, start_world
from dtrain.engines.base import build_engine
from dtrain.methods.base import build_method
from dtrain.models.hub import base_folder
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.sharded_loading import stream_base
from dtrain.samples.make import ensure


def kept(engine: Any, refs: list[Any]) -> list[str]:
    """Shapes of filled parameters that live on, though the engine does not compute with them."""
    engine_params = {id(p) for p in engine.module.parameters()}
    alive = [parameter for ref in refs if (parameter := ref()) is not None]
    sharded = ENGINES[engine.recipe.engine.kind].shards_base
    # ZeRO-3 empties the very parameter; where nothing is sharded it stays as it is
    return [str(p.shape) for p in alive if id(p) not in engine_params or (sharded and p.numel())]


def facts(kind: str, method: str, world: World) -> dict[str, Any]:
    """How many parameters were filled, and what still lives of them when the engine is built."""
    overrides = [f"engine.kind={kind}", f"stages.domain.method={{kind: {method}}}"]
    recipe = load_recipe("tiny", overrides)
    stage, quantized = recipe.stages[0], method == "qlora"
    base = base_folder(recipe.model.base)
    settings = {"quantized": quantized, "dtype": torch.float32, "device": world.device}
    streamed = stream_base(base, recipe.model, **settings)
    refs: list[Any] = []

    def materialize(block: nn.Module) -> None:
        empty = {id(p) for p in block.parameters() if p.is_meta}
        owners = [m for m in block.modules() if any(id(p) in empty for p in m.parameters(False))]
        streamed.materialize(block)
        for module in owners:
            refs.extend(weakref.ref(p) for p in module.parameters(False))

    model = build_method(stage.method).attach(streamed.model, seed=0, device=world.device)
    apply_kernels(model, recipe.model)
    if not ENGINES[kind].shards_base:
        materialize(model)
    engine = build_engine(model, recipe, stage, world, materialize)
    gc.collect()
    result = {"filled": len(refs), "kept": kept(engine, refs)}
    engine.close()
    return result


def main(cases: list[str]) -> int:
    world = start_world("cpu")
    ensure(sample_name(load_recipe("tiny").model.base))
    for case in cases:
        result = facts(*case.split(":"), world)
        if world.is_first:
            print("FACTS", json.dumps({"case": case, **result}), flush=True)
    end_world()
    return 0
