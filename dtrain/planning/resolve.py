"""`engine.kind: auto` and `micro_batch_sequences: auto`, replaced by the plan's choice."""

from __future__ import annotations

from dtrain.config.checks import accumulation
from dtrain.config.schema import Recipe, Stage
from dtrain.planning.bases import find_shape
from dtrain.planning.choose import choose
from dtrain.planning.memory import memory_of
from dtrain.planning.setup import Cluster, Setup, setup_of
from dtrain.planning.shapes import Shape


def has_choice(recipe: Recipe) -> bool:
    """Whether the plan has something to choose."""
    return _free_engine(recipe) or any(_free_micro(stage) for stage in recipe.stages)


def resolved(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with nothing left to choose.

    One engine runs all stages: it is chosen for the one that needs most memory.

    Raises:
        UserError: the base's shape is not known, or a batch cannot be shared among the ranks.
    """
    shape, _ = find_shape(recipe.model.base)
    check_batches(recipe, cluster)
    if _free_engine(recipe):
        recipe = _with_engine(recipe, shape, cluster)
    return _with_micro_batches(recipe, shape, cluster)


def check_batches(recipe: Recipe, cluster: Cluster) -> None:
    """Refuse a batch that the ranks cannot share."""
    for stage in recipe.stages:
        train = stage.train
        accumulation(train.global_batch_sequences, cluster.ranks, train.micro_batch)


def _free_engine(recipe: Recipe) -> bool:
    plain = all(stage.train.optimizer == "adamw" for stage in recipe.stages)
    return recipe.engine.kind == "auto" and recipe.determinism == "off" and plain


def _free_micro(stage: Stage) -> bool:
    return stage.train.micro_batch_sequences == "auto"


def _with_engine(recipe: Recipe, shape: Shape, cluster: Cluster) -> Recipe:
    setups = [(setup_of(recipe, x, shape, cluster, "ddp"), _free_micro(x)) for x in recipe.stages]
    setup, free = max(setups, key=lambda item: memory_of(item[0]).peak)
    chosen = choose(setup, cluster, any_engine=True, any_micro=free)
    update = {"kind": chosen.engine, "shard": _shard_word(chosen)}
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=update)})


def _shard_word(setup: Setup) -> str:
    nodes = setup.engine == "fsdp2" and setup.shard == setup.node_ranks < setup.ranks
    return "node" if nodes else "all"


def _with_micro_batches(recipe: Recipe, shape: Shape, cluster: Cluster) -> Recipe:
    stages = []
    for stage in recipe.stages:
        if _free_micro(stage):
            setup = setup_of(recipe, stage, shape, cluster)
            setup = choose(setup, cluster, any_engine=False, any_micro=True)
            update = {"micro_batch_sequences": setup.micro_batch}
            stage = stage.model_copy(update={"train": stage.train.model_copy(update=update)})
        stages.append(stage)
    return recipe.model_copy(update={"stages": stages})
