"""Engines and methods side by side, and what `auto` in a recipe becomes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dtrain.config.checks import check_batches
from dtrain.config.engines import DEFAULT_ENGINE, ENGINES, EngineCapabilities
from dtrain.config.methods import TRAITS, MethodSettings, method_like
from dtrain.config.optimizers import OPTIMIZERS
from dtrain.config.schema import Recipe, Stage
from dtrain.core.units import size
from dtrain.planning.build_workload import build_workload
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.fit import FITS, ORDER, TIGHT, MemoryFit, assess_fit
from dtrain.planning.known_models import find_shape
from dtrain.planning.shapes import ModelShape
from dtrain.planning.speed import tokens_per_second
from dtrain.planning.workload import Cluster, Workload

GOOD_SPEED = 0.97  # of the best speed; among options that reach it, less memory is better
MAX_MICRO_TOKENS = 16_384  # a larger micro-batch does not use a GPU better


@dataclass(frozen=True)
class PlanOption:
    """One way to run a stage.

    Attributes:
        speed: tokens a second of all ranks.
        reason: what it sends, or why it does not fit.
    """

    workload: Workload
    fit: MemoryFit
    speed: float
    reason: str

    @property
    def engine(self) -> str:
        """The engine's name, with the ranks that share a copy where the recipe can choose them."""
        workload = self.workload
        if not workload.capabilities.shard_group or workload.ranks == workload.node_ranks:
            return workload.engine
        return f"{workload.engine} {'all' if workload.shard == workload.ranks else 'node'}"


def list_options(workload: Workload, cluster: Cluster) -> list[PlanOption]:
    """Every engine with each method; best fit first, then the recipe's method, then speed."""
    options = [
        _best_micro_batch(variant, cluster)
        for method in _compared_methods(workload.method)
        for variant in _engine_variants(replace(workload, method=method))
    ]

    def rank(option: PlanOption) -> tuple[int, bool, float]:
        is_other_method = option.workload.method != workload.method
        return ORDER.index(option.fit.verdict), is_other_method, -option.speed

    return sorted(options, key=rank)


def _compared_methods(method: MethodSettings) -> list[MethodSettings]:
    """The methods that every plan shows, and the recipe's."""
    kinds = [kind for kind, traits in TRAITS.items() if traits.is_compared]
    return [method_like(method, kind) for kind in dict.fromkeys([*kinds, method.kind])]


def _engine_variants(workload: Workload) -> list[Workload]:
    """The workload under each engine that could run it; engines that send less come first."""
    if workload.ranks == 1:
        return [_with_engine(workload, DEFAULT_ENGINE, 1)]
    variants = [
        _with_engine(workload, kind, shard)
        for kind, engine in sorted(ENGINES.items(), key=lambda item: item[1].shards_base)
        for shard in _shards(workload, engine)
    ]
    return [variant for variant in variants if variant.supports_optimizer]


def _with_engine(workload: Workload, kind: str, shard: int) -> Workload:
    offload = workload.offload and ENGINES[kind].offload
    return replace(workload, engine=kind, shard=shard, offload=offload)


def _shards(workload: Workload, engine: EngineCapabilities) -> list[int]:
    """Numbers of ranks that could share one copy of the base."""
    if not engine.shards_base:
        return [1]
    has_nodes = engine.shard_group and 1 < workload.node_ranks < workload.ranks
    return [workload.node_ranks, workload.ranks] if has_nodes else [workload.ranks]


def micro_batches(workload: Workload) -> list[int]:
    """Micro-batch sizes that divide a rank's share of the global batch, smallest first."""
    share = workload.micro_batch * workload.accumulation
    largest = max(1, MAX_MICRO_TOKENS // workload.sequence_length)
    return [n for n in range(1, share + 1) if share % n == 0 and n <= largest]


def _best_micro_batch(workload: Workload, cluster: Cluster) -> PlanOption:
    """The smallest micro-batch that is nearly as fast as any that fits; 1 if none fits."""
    share = workload.micro_batch * workload.accumulation
    options = [
        build_option(replace(workload, micro_batch=n, accumulation=share // n), cluster)
        for n in micro_batches(workload)
    ]
    fitting = [option for option in options if option.fit.verdict == FITS]
    return _first_fast(fitting or options[:1])


def _first_fast(options: list[PlanOption]) -> PlanOption:
    """The first option that is nearly as fast as the fastest."""
    best = max(option.speed for option in options)
    return next(option for option in options if option.speed >= GOOD_SPEED * best)


def build_option(workload: Workload, cluster: Cluster) -> PlanOption:
    """The option with its fit, its speed, and the reason for or against it."""
    fit = assess_fit(workload, cluster)
    speed = tokens_per_second(workload, cluster).middle
    return PlanOption(workload, fit, speed, _reason(workload, cluster, fit))


def _reason(workload: Workload, cluster: Cluster, fit: MemoryFit) -> str:
    model = build_engine_model(workload)
    if fit.verdict != FITS:
        terms = model.peak_memory().terms()
        return f"+{size(fit.budget - fit.usable)}, {max(terms, key=terms.__getitem__)}"
    if cluster.nodes > 1:
        return f"{size(model.entering_bytes())} to a node"
    return f"{size(model.received_bytes())} to a GPU"


def choose(workload: Workload, cluster: Cluster, *, any_engine: bool, any_micro: bool) -> Workload:
    """What `engine.kind: auto` and `micro_batch_size: auto` become.

    Of the options that fit, the simplest engine that is nearly the fastest; if none fits, the
    option that needs least memory.
    """
    variants = _engine_variants(workload) if any_engine else [workload]
    build = _best_micro_batch if any_micro else build_option
    options = [build(variant, cluster) for variant in variants]
    for verdict in (FITS, TIGHT):
        fitting = [option for option in options if option.fit.verdict == verdict]
        if fitting:
            return _first_fast(fitting).workload
    return min(options, key=lambda option: option.fit.budget).workload


def has_choice(recipe: Recipe) -> bool:
    """Whether the recipe leaves the plan something to choose."""
    return _chooses_engine(recipe) or any(_chooses_micro_batch(x) for x in recipe.stages)


def resolve(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with every `auto` replaced that the plan can choose.

    One engine runs all stages: it is chosen for the stage that needs most memory.

    Raises:
        UserError: the base's shape is not known, or the ranks cannot share a batch evenly.
    """
    shape, _ = find_shape(recipe.model.base)
    check_batches(recipe, cluster.ranks)
    if _chooses_engine(recipe):
        recipe = _resolve_engine(recipe, shape, cluster)
    return _resolve_micro_batches(recipe, shape, cluster)


def _chooses_engine(recipe: Recipe) -> bool:
    needs_whole = any(OPTIMIZERS[s.train.optimizer].whole_parameters for s in recipe.stages)
    return recipe.engine.kind == "auto" and recipe.determinism == "off" and not needs_whole


def _chooses_micro_batch(stage: Stage) -> bool:
    return stage.train.micro_batch_size == "auto"


def _resolve_engine(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> Recipe:
    workloads = [
        (build_workload(recipe, stage, shape, cluster, DEFAULT_ENGINE), _chooses_micro_batch(stage))
        for stage in recipe.stages
    ]
    largest, any_micro = max(
        workloads, key=lambda item: build_engine_model(item[0]).peak_memory().peak
    )
    chosen = choose(largest, cluster, any_engine=True, any_micro=any_micro)
    in_node = chosen.capabilities.shard_group and chosen.shard == chosen.node_ranks < chosen.ranks
    update = {"kind": chosen.engine, "shard": "node" if in_node else "all"}
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=update)})


def _resolve_micro_batches(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> Recipe:
    stages = []
    for stage in recipe.stages:
        if _chooses_micro_batch(stage):
            workload = build_workload(recipe, stage, shape, cluster)
            workload = choose(workload, cluster, any_engine=False, any_micro=True)
            update = {"micro_batch_size": workload.micro_batch}
            stage = stage.model_copy(update={"train": stage.train.model_copy(update=update)})
        stages.append(stage)
    return recipe.model_copy(update={"stages": stages})
