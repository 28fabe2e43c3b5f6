"""Worker: one fsdp2 step of `tiny`'s model on 2 x 2 ranks; prints the bytes of each collective.

The counting wraps torch's collectives, so that what FSDP2 really sends is what is counted.
"""

from __future__ import annotations

import json
from collections import Counter

import torch
import torch.distributed as dist

from dtrain.config.load import load_recipe
from dtrain.data.loader import MicroBatch
from dtrain.distributed.world import World, end_world, start_world
from dtrain.engines import shared_gather
from dtrain.engines.base import Engine, build_engine
from dtrain.engines.fsdp2 import build_mesh
from dtrain.methods.base import build_method
from dtrain.models.hub import base_folder
from dtrain.models.load import load_base
from dtrain.models.loss import target_losses
from dtrain.models.parameter_counts import parameter_counts
from dtrain.samples.make import ensure

COLLECTIVES = ("all_gather_single", "reduce_scatter_single", "all_reduce")
TOKENS = 32
STAGES = ("domain", "task")


def counted(sent: Counter[str]) -> None:
    """Count the larger of what a collective takes and gives, by its name and its ranks."""
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def wrapper(*arguments, _original=original, _name=name, **named):
            group = named.get("group") or dist.group.WORLD
            tensors = [t for t in (*arguments, *named.values()) if torch.is_tensor(t)]
            size = max(t.numel() * t.element_size() for t in tensors)
            sent[f"{_name} {dist.get_process_group_ranks(group)}"] += size
            return _original(*arguments, **named)

        setattr(dist, name, wrapper)


def batch() -> MicroBatch:
    ids = torch.arange(TOKENS)[None]
    every = torch.arange(TOKENS - 1)
    return MicroBatch(ids, ids, every, every + 1, [TOKENS], [0], [TOKENS])


def build(engine: str, world: World) -> tuple[Engine, int, int]:
    """`tiny`'s model and adapter under an engine; elements that train, and all."""
    stages = [f"stages.{name}.train.global_batch_size={world.size}" for name in STAGES]
    launch = f"launch.processes={world.size}"
    recipe = load_recipe("tiny", [f"engine={engine}", launch, *stages])
    world.rank0_first(lambda: ensure("tiny-llama"))
    base = base_folder(recipe.model.base)
    loaded = load_base(
        base, recipe.model, quantized=False, dtype=torch.float32, device=world.device
    )
    model = build_method(recipe.stages[0].method).attach(loaded, seed=0)
    counts = parameter_counts(model)
    return build_engine(model, recipe, recipe.stages[0], world, lambda block: None), *counts


def main(arguments: list[str]) -> int:
    shared_gather.shared_buffer = lambda *_, **__: None  # as between nodes: all sent is counted
    world = start_world("cpu")
    engine, trainable, total = build("{kind: fsdp2, shard: 2}", world)
    sent: Counter[str] = Counter()
    counted(sent)
    for last in (False, True):  # two micro-batches: accumulation must not send twice
        engine.backward(target_losses(engine.model, batch())[0], last=last)
    mesh = build_mesh(2, world)
    groups = {
        name: dist.get_process_group_ranks(mesh.get_group(name)) for name in mesh.mesh_dim_names
    }
    if world.is_first:
        facts = {"trainable": trainable, "total": total, "sent": sent, "groups": groups}
        print("FACTS " + json.dumps(facts), flush=True)
    end_world()
    return 0
