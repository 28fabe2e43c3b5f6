"""Worker: real optimizer steps under an engine; prints tensor-level peaks and the bytes sent.

A dispatch mode sees every operation and sums up
the live storages, so the peak counts tensors only, without allocator and libraries. Collectives are
wrapped, so the bytes are those that an engine really sends.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtrain.config.engines import ENGINES
from dtrain.config.load import load_recipe
from dtrain.data.loader import MicroBatch
from dtrain.distributed.world import World, end_world, start_world
from dtrain.engines import shared_gather
from dtrain.engines.base import build_engine
from dtrain.methods.base import build_method
from dtrain.models.dropout import set_dropout_key
from dtrain.models.kernels import native
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import load_base, resolve_dtype
from dtrain.models.parameter_counts import parameter_counts
from dtrain.models.sharded_loading import stream_base
from dtrain.objectives.base import build_objective
from dtrain.simulation.ledger import watch_resizes
from dtrain.training.train_step import compute_loss

STEPS = 2


class Storages(TorchDispatchMode):
    """The sum of the living storages, and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.total = self.peak = 0

    def take(self, tensor: torch.Tensor) -> None:
        """Count the storage behind a tensor until it dies."""
        tensor = getattr(tensor, "_local_tensor", tensor)
        if type(tensor) is not torch.Tensor and not isinstance(tensor, torch.nn.Parameter):
            return
        if tensor.is_meta:  # a shape that ZeRO-2 remembers: it has a size, and no memory
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self.sizes.get(key)
        if known == size:
            return
        if known is None:
            weakref.finalize(storage, self.forget, key)
        self.sizes[key] = size
        self.grow(size - (known or 0))

    def forget(self, key: int) -> None:
        self.total -= self.sizes.pop(key, 0)

    def grow(self, size: int) -> None:
        self.total += size
        self.peak = max(self.peak, self.total)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees what it gathered by resizing its storage, which is no operation."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            change, self.sizes[key] = size - self.sizes[key], size
            self.grow(change)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((result, args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self.take(leaf)
        return result


# What a rank receives of a collective over n ranks, as a multiple of its largest tensor.
SHARES = {
    "all_gather_into_tensor": lambda n: (n - 1) / n,
    "all_gather_single": lambda n: (n - 1) / n,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "reduce_scatter_single": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
}


def counted(received: Counter[str]) -> None:
    """Count what a rank receives over rings, by the collective's name."""
    for name, share in SHARES.items():
        original = getattr(dist, name, None)
        if original is None:
            continue

        def wrapper(*arguments, _original=original, _name=name, _share=share, **named):
            tensors = [t for t in (*arguments, *named.values()) if torch.is_tensor(t)]
            ranks = dist.get_world_size(named.get("group"))
            size = max(t.numel() * t.element_size() for t in tensors)
            received[_name] += size * _share(ranks)
            return _original(*arguments, **named)

        setattr(dist, name, wrapper)


def batch(vocabulary: int, tokens: int, number: int) -> MicroBatch:
    ids = torch.randint(0, vocabulary, (1, tokens))
    every = torch.arange(tokens - 1)
    positions = torch.arange(tokens)[None]
    return MicroBatch(ids, positions, every, ids[0, 1:], [tokens], [number], [tokens])


def built(recipe, stage, world):
    method = build_method(stage.method)
    settings = {
        "quantized": method.traits.quantizes_base,
        "dtype": method.base_dtype(resolve_dtype(recipe.model.dtype, world.device)),
        "device": world.device,
    }
    base = Path(recipe.model.base)
    if ENGINES[recipe.engine.kind].shards_base:
        streamed = stream_base(base, recipe.model, **settings)
        model, load = streamed.model, streamed.materialize
    else:
        model, load = load_base(base, recipe.model, **settings), lambda block: None

    def materialize(block):
        load(block)
        method.on_weights_loaded(block)

    model = method.attach(model, seed=0, device=world.device)
    apply_kernels(model, recipe.model)
    native.set_enabled(on=False)  # a CPU's own loops, which keep less; the plan is for GPUs
    counts = parameter_counts(model)
    return build_engine(model, recipe, stage, world, materialize), counts


def measure(overrides: list[str], world: World, received: Counter[str]) -> dict[str, Any]:
    """Steps under one recipe: counts, peaks by phase, bytes received in the last step."""
    recipe = load_recipe("tiny", overrides)
    stage, storages = recipe.stages[0], Storages()
    watch_resizes(storages.resized)
    with storages:
        engine, counts = built(recipe, stage, world)
    for tensor in [*engine.module.parameters(), *engine.module.buffers()]:
        storages.take(tensor)
    for step in range(STEPS):
        received.clear()
        phases = one_step(engine, stage, storages, step)
    engine.close()
    return {"counts": counts, "received": dict(received), "phases": of_the_fullest_rank(phases)}


def of_the_fullest_rank(phases: dict[str, int]) -> dict[str, int]:
    """The largest of each phase: ranks differ in whose parameters they update."""
    most = torch.tensor(list(phases.values()))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return dict(zip(phases, most.tolist(), strict=True))


def one_step(engine: Any, stage: Any, storages: Storages, step: int) -> dict[str, int]:
    """The peak of forward, backward and update."""
    train = stage.train
    micro = train.global_batch_size // engine.world.size // train.micro_batch
    tokens = train.micro_batch * stage.data.sequence_length
    vocabulary = engine.module.get_input_embeddings().num_embeddings
    phases = {"forward": 0, "backward": 0, "update": 0}

    def ends(name: str) -> None:
        phases[name] = max(phases[name], storages.peak)
        storages.peak = storages.total

    engine.model.train()
    objective = build_objective(stage)
    with storages:
        storages.peak = storages.total
        for number in range(micro):
            sample = batch(vocabulary, tokens, number)
            set_dropout_key(engine.module, 0, step, [number], [tokens])
            last = number == micro - 1
            engine.before_forward(last=last)
            loss = compute_loss(engine, objective, sample).loss
            ends("forward")
            engine.backward(loss, last=last)
            ends("backward")
            del loss
            gc.collect()  # count live tensors, not garbage
        engine.step(1e-4)
        ends("update")
    return phases


def main(arguments: list[str]) -> int:
    """One process group for all recipes; their overrides are parted by `+`."""
    received: Counter[str] = Counter()
    world = start_world("cpu")
    counted(received)
    shared_gather.shared_buffer = lambda *_, **__: None  # as between nodes: all sent is counted
    recipes: list[list[str]] = [[]]
    for word in arguments:
        recipes.append([]) if word == "+" else recipes[-1].append(word)
    for overrides in recipes:
        facts = measure(overrides, world, received)
        gc.collect()
        if world.is_first:
            print("FACTS " + json.dumps(facts), flush=True)
    end_world()
    return 0


if __name__ == "__main__":  # tests/bench/plan_real.py starts it under torchrun
    raise SystemExit(main(sys.argv[1:]))
