"""Engines and methods side by side, and which of them `auto` takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dtrain.config.checks import accumulation
from dtrain.config.schema import Recipe, Stage
from dtrain.core.units import size
from dtrain.planning.communication import entering_bytes, received_bytes
from dtrain.planning.fit import FITS, ORDER, TIGHT, MemoryFit, assess_fit
from dtrain.planning.known_models import find_shape
from dtrain.planning.memory import estimate_memory
from dtrain.planning.shapes import ModelShape
from dtrain.planning.speed import tokens_per_second
from dtrain.planning.workload import Cluster, Workload, build_workload

METHODS = ("full", "lora", "qlora")
NEARLY = 0.97  # of the best speed: less memory is better then
MOST_MICRO_TOKENS = 16_384  # more tokens at once keep no GPU busier


@dataclass(frozen=True)
class Option:
    """A way to run a stage."""

    workload: Workload
    fit: MemoryFit
    speed: float
    reason: str

    @property
    def engine(self) -> str:
        """As a person says it: fsdp2 tells who shares a copy."""
        workload = self.workload
        if workload.engine != "fsdp2" or workload.ranks == workload.node_ranks:
            return workload.engine
        return "fsdp2 all" if workload.shard == workload.ranks else "fsdp2 node"


def options(workload: Workload, cluster: Cluster) -> list[Option]:
    """Every engine with every method, the best first: what fits, the recipe's method, the speed."""
    found = [
        option
        for method in METHODS
        for variant in _engines(_with_method(workload, method), cluster)
        if (option := _best_micro_batch(variant, cluster))
    ]
    return sorted(
        found,
        key=lambda one: (
            ORDER.index(one.fit.verdict),
            one.workload.method != workload.method,
            -one.speed,
        ),
    )


def _with_method(workload: Workload, method: str) -> Workload:
    if method == workload.method:
        return workload
    if method == "full":
        return replace(workload, method=method, rank=0, has_dropout=False)
    return replace(workload, method=method, rank=workload.rank or 16, has_dropout=True)


def _engines(workload: Workload, cluster: Cluster) -> list[Workload]:
    """The setup under each engine that could run it; who sends least stands first."""
    ranks, node = workload.ranks, workload.node_ranks
    found = [replace(workload, engine="ddp", shard=1, offload=False)]
    if workload.optimizer != "adamw" or ranks == 1:
        return found
    found.append(replace(workload, engine="zero2", shard=1, offload=False))
    if 1 < node < ranks:
        found.append(replace(workload, engine="fsdp2", shard=node, offload=False))
    found.append(replace(workload, engine="fsdp2", shard=ranks, offload=False))
    found.append(replace(workload, engine="zero3", shard=ranks, offload=workload.offload))
    return found


def micro_batches(workload: Workload) -> list[int]:
    """Sequences at once that divide a rank's share of the global batch, the smallest first."""
    share = workload.micro_batch * workload.accumulation
    most = max(1, MOST_MICRO_TOKENS // workload.sequence_length)
    return [n for n in range(1, share + 1) if share % n == 0 and n <= most]


def _best_micro_batch(workload: Workload, cluster: Cluster) -> Option:
    """The smallest micro-batch that is nearly as fast as any that fits; 1 where none does."""
    share = workload.micro_batch * workload.accumulation
    tried = [
        option_of(replace(workload, micro_batch=n, accumulation=share // n), cluster)
        for n in micro_batches(workload)
    ]
    fitting = [one for one in tried if one.fit.verdict == FITS] or tried[:1]
    best = max(one.speed for one in fitting)
    return next(one for one in fitting if one.speed >= NEARLY * best)


def option_of(workload: Workload, cluster: Cluster) -> Option:
    """A setup with its verdict, speed and the reason that speaks for or against it."""
    fit = assess_fit(workload, cluster)
    speed = tokens_per_second(workload, cluster).middle
    return Option(workload, fit, speed, _reason(workload, cluster, fit))


def _reason(workload: Workload, cluster: Cluster, fit: MemoryFit) -> str:
    if fit.verdict != FITS:
        name = max(estimate_memory(workload).terms().items(), key=lambda item: item[1])[0]
        return f"+{size(fit.budget - fit.usable)}, {name}"
    if cluster.nodes > 1:
        return f"{size(entering_bytes(workload))} to a node"
    return f"{size(received_bytes(workload))} to a GPU"


def choose(workload: Workload, cluster: Cluster, *, any_engine: bool, any_micro: bool) -> Workload:
    """What `engine.kind: auto` and `micro_batch_size: auto` become.

    Of what fits, the simplest engine that is nearly the fastest; if nothing does, the smallest.
    """
    variants = _engines(workload, cluster) if any_engine else [workload]
    if any_micro:
        tried = [_best_micro_batch(one, cluster) for one in variants]
    else:
        tried = [option_of(one, cluster) for one in variants]
    for word in (FITS, TIGHT):
        fitting = [one for one in tried if one.fit.verdict == word]
        if fitting:
            best = max(one.speed for one in fitting)
            return next(one.workload for one in fitting if one.speed >= NEARLY * best)
    return min(tried, key=lambda one: one.fit.budget).workload


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
        accumulation(train.global_batch_size, cluster.ranks, train.micro_batch)


def _free_engine(recipe: Recipe) -> bool:
    plain = all(stage.train.optimizer == "adamw" for stage in recipe.stages)
    return recipe.engine.kind == "auto" and recipe.determinism == "off" and plain


def _free_micro(stage: Stage) -> bool:
    return stage.train.micro_batch_size == "auto"


def _with_engine(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> Recipe:
    setups = [
        (build_workload(recipe, x, shape, cluster, "ddp"), _free_micro(x)) for x in recipe.stages
    ]
    workload, free = max(setups, key=lambda item: estimate_memory(item[0]).peak)
    chosen = choose(workload, cluster, any_engine=True, any_micro=free)
    update = {"kind": chosen.engine, "shard": _shard_word(chosen)}
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=update)})


def _shard_word(workload: Workload) -> str:
    nodes = workload.engine == "fsdp2" and workload.shard == workload.node_ranks < workload.ranks
    return "node" if nodes else "all"


def _with_micro_batches(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> Recipe:
    stages = []
    for stage in recipe.stages:
        if _free_micro(stage):
            workload = build_workload(recipe, stage, shape, cluster)
            workload = choose(workload, cluster, any_engine=False, any_micro=True)
            update = {"micro_batch_size": workload.micro_batch}
            stage = stage.model_copy(update={"train": stage.train.model_copy(update=update)})
        stages.append(stage)
    return recipe.model_copy(update={"stages": stages})
