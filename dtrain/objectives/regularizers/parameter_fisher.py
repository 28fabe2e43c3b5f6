"""The diagonal Fisher information of the base's own parameters, in the shards of the engine.

F = 1/K Σ g², over some sequences with K targets in all, where g is the gradient of the
log-likelihood of a sequence's targets: the empirical Fisher information, per target, of the model
that the stage starts from. The stage's folder has it as the weights of a checkpoint, so that a
resumed stage reads it, on any ranks and under any engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from dtrain.checkpoints.folder import newest_on_first_rank
from dtrain.checkpoints.parameter_shards import (
    GRADIENT,
    WEIGHT,
    ParameterShard,
    split_among_replicas,
)
from dtrain.checkpoints.saver import Saver
from dtrain.config.regularize import Ewc
from dtrain.core.hashes import fingerprint
from dtrain.core.log import progress, say
from dtrain.data.loader import MicroBatch
from dtrain.distributed.world import World
from dtrain.models.dropout import set_dropout_key
from dtrain.models.loss import target_losses
from dtrain.objectives.base import ShardedModel, StageContext
from dtrain.objectives.regularizers.fisher import chosen_sequences


def diagonal_fisher(
    engine: ShardedModel, context: StageContext, settings: Ewc
) -> list[ParameterShard]:
    """The engine's parameter shards with F, float32, as their weights; it is estimated once."""
    loader, ids = chosen_sequences(context, settings)
    made_from = {
        "start": fingerprint(dict(context.start)),
        "data": loader.dataset.fingerprint,
        "sequences": fingerprint(ids.tolist()),
    }
    shards = zero_shards(engine)
    folder = context.folder / "fisher"
    if not restore(folder, made_from, shards, context.world):
        with progress("Fisher information", len(ids)) as bar:
            targets = 0
            for number in range(len(ids)):
                targets += add_squares(engine, shards, loader.read(ids[number:][:1]), context.world)
                bar.advance()
        for shard in shards:
            for value in shard.tensors.values():
                value.div_(max(targets, 1))
        save(folder, made_from, split_among_replicas(shards, *engine.replica), context.world)
    say(f"Fisher information of {len(ids)} sequences: {folder}")
    return shards


def zero_shards(engine: ShardedModel) -> list[ParameterShard]:
    """Parameter shards like those of the engine, whose weights are zero."""
    return [
        replace(s, tensors={WEIGHT: torch.zeros_like(s.tensors[WEIGHT])} if s.tensors else {})
        for s in engine.parameter_shards()
    ]


def add_squares(
    engine: ShardedModel, sums: list[ParameterShard], batch: MicroBatch, world: World
) -> int:
    """Add g² of a sequence; return the number of its targets.

    Every rank computes the same sequence. The engine averages the equal gradients and leaves each
    rank its range of them, so that the result does not depend on the number of ranks.
    """
    engine.model.train()
    set_dropout_key(engine.module, 0, 0, [], [])  # nothing is dropped
    engine.before_forward(last=True)
    with engine.autocast():
        loss, _ = target_losses(engine.model, batch.to(world.device))
    engine.backward(loss, last=True)
    for total, shard in zip(sums, engine.parameter_shards(gradients=True), strict=True):
        if GRADIENT in shard.tensors:
            gradient = shard.tensors[GRADIENT].float()
            total.tensors[WEIGHT].addcmul_(gradient, gradient)
    engine.drop_gradient()
    return len(batch.targets)


def restore(
    folder: Path, made_from: dict[str, str], shards: Iterable[ParameterShard], world: World
) -> bool:
    """Fill the shards from what is saved; return False if nothing is, or if it is of other rows."""
    saved = newest_on_first_rank(folder, world)
    if saved is None or saved.state != made_from:
        return False
    saved.restore(shards)
    return True


def save(
    folder: Path, made_from: dict[str, str], shards: Iterable[ParameterShard], world: World
) -> None:
    """Save the shards of all ranks, with the fingerprints of what they were made from."""
    attempt = world.broadcast_text(uuid.uuid4().hex[:8])
    saver = Saver(folder, rank=world.rank, ranks=world.size, attempt=attempt)
    saver.save(0, shards, made_from)
    saver.wait()
    world.barrier()
