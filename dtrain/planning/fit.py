"""Whether a stage fits on a GPU, and the cheapest changes that would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

from dtrain.config.engines import ENGINES, engines_with
from dtrain.config.methods import over_nf4
from dtrain.planning.calibration import find_correction
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import GPUS
from dtrain.planning.workload import Cluster, Workload

FITS, TIGHT, DOES_NOT_FIT = "FITS", "TIGHT", "DOES NOT FIT"
ORDER = (FITS, TIGHT, DOES_NOT_FIT)

# Memory that is not in tensors. An allocator reserves more than it hands out, in proportion;
# libraries, kernels and communication need memory of their own. With these values the budget covers
# all of 66 published peaks (tests/bench/plan_points.py); factors of 1.18 to 1.19, which cover all
# rows but one source's, cover 65.
LOWER_FACTOR, LOWER_BYTES = 1.0, 0.5e9  # the least that a CUDA context takes
BUDGET_FACTOR, BUDGET_BYTES = 1.20, 2.5e9

STAGE_GROUPS = ("train.", "method.", "method=", "data.")  # beginnings of keys that each stage has
MIN_RANK = 4  # no advice to train with less
MAX_SUGGESTIONS = 3


@dataclass(frozen=True)
class MemoryFit:
    """The memory that a stage needs of one GPU, and what the GPU has, in bytes.

    Attributes:
        lower: the stage cannot run with less.
        budget: the stage is likely to need no more.
        usable: memory of the GPU that a process can use.
    """

    lower: float
    budget: float
    usable: float

    @property
    def verdict(self) -> str:
        """FITS, TIGHT or DOES NOT FIT."""
        if self.budget <= self.usable:
            return FITS
        return TIGHT if self.lower <= self.usable else DOES_NOT_FIT


def assess_fit(workload: Workload, cluster: Cluster) -> MemoryFit:
    """Compare a stage's memory with the GPU's, corrected by what earlier runs here needed."""
    model = build_engine_model(workload)
    peak = model.peak_memory().peak
    correction = find_correction(cluster.gpu.name, workload.engine, workload.method.kind, peak)
    tensors = peak * (correction.memory_factor if correction else 1)
    lower = LOWER_FACTOR * model.least_bytes() + LOWER_BYTES
    budget = BUDGET_FACTOR * tensors + BUDGET_BYTES
    return MemoryFit(lower, budget, cluster.gpu.usable_bytes)


@dataclass(frozen=True)
class Suggestion:
    """A change to the recipe or the cluster.

    Attributes:
        settings: what to change, as keys of a stage or the recipe, or options of `dtrain plan`.
        cost: the price of the change, as a short text.
        workload, cluster: the result of the change.
    """

    settings: tuple[str, ...]
    cost: str
    workload: Workload
    cluster: Cluster

    def arguments(self, stage: str) -> str:
        """What to add to the command line, for the stage of this name."""
        texts = (f"stages.{stage}.{x}" if x.startswith(STAGE_GROUPS) else x for x in self.settings)
        return " ".join(f"'{text}'" if "{" in text else text for text in texts)

    @property
    def fits(self) -> bool:
        """Whether the changed stage fits."""
        return assess_fit(self.workload, self.cluster).verdict == FITS


def suggest_changes(workload: Workload, cluster: Cluster) -> list[Suggestion]:
    """The cheapest changes that fit, each of them as few together as are needed."""
    found: list[tuple[set[Change], Suggestion]] = []
    for changes in _combinations_by_price():
        if any(smaller <= set(changes) for smaller, _ in found):
            continue
        combined = _combine(changes, workload, cluster)
        if combined and combined.fits:
            found.append((set(changes), combined))
            if len(found) == MAX_SUGGESTIONS:
                break
    return [combined for _, combined in found]


def suggest_reductions(workload: Workload, cluster: Cluster) -> list[Suggestion]:
    """The cheapest changes that need less memory, whether or not the result fits."""
    now = _gpu_share(workload, cluster)
    changed = [x for change in CHANGES if (x := change(workload, cluster))]
    return [x for x in changed if _gpu_share(x.workload, x.cluster) < now][:MAX_SUGGESTIONS]


def _combinations_by_price() -> list[tuple[Change, ...]]:
    """One change and more, the cheapest together first; all else equal, fewer."""
    sets = [x for n in range(1, len(CHANGES) + 1) for x in combinations(CHANGES, n)]
    return sorted(sets, key=lambda changes: sum(CHANGES[change] for change in changes))


def _combine(
    changes: tuple[Change, ...], workload: Workload, cluster: Cluster
) -> Suggestion | None:
    """All of these changes; None if one of them changes nothing any more.

    The largest batch or rank that fits depends on the other changes, which come first.
    """
    made: dict[Change, Suggestion] = {}
    for change in sorted(changes, key=lambda change: change in SIZED):
        changed = change(workload, cluster)
        if changed is None:
            return None
        workload, cluster = changed.workload, changed.cluster
        made[change] = changed
    parts = list(made.values())  # in this order: a method written whole has a rank too
    # Of two values for a key the last counts, as on a command line.
    last = {setting.partition("=")[0]: setting for part in parts for setting in part.settings}
    settings = tuple(last.values())
    return Suggestion(settings, "; ".join(part.cost for part in parts), workload, cluster)


def _gpu_share(workload: Workload, cluster: Cluster) -> float:
    """The budget as a fraction of the GPU's memory."""
    fit = assess_fit(workload, cluster)
    return fit.budget / fit.usable


def _smaller_micro_batch(workload: Workload, cluster: Cluster) -> Suggestion | None:
    """The largest smaller micro-batch that fits, else 1."""
    sequences = workload.micro_batch * workload.accumulation
    smaller = [n for n in range(1, workload.micro_batch) if sequences % n == 0]
    if not smaller:
        return None
    variants = [replace(workload, micro_batch=n, accumulation=sequences // n) for n in smaller]
    fitting = [x for x in variants if assess_fit(x, cluster).verdict == FITS]
    chosen = fitting[-1] if fitting else variants[0]
    setting = f"train.micro_batch_size={chosen.micro_batch}"
    return Suggestion((setting,), "same results, accumulated in more steps", chosen, cluster)


def _lower_rank(workload: Workload, cluster: Cluster) -> Suggestion | None:
    """The largest of a half, a quarter and an eighth of the rank that fits, else the smallest."""
    ranks = [workload.method.rank // part for part in (2, 4, 8)]
    ranks = [rank for rank in ranks if rank >= MIN_RANK]
    if not ranks or "r" not in type(workload.method).model_fields:
        return None
    methods = [workload.method.model_copy(update={"r": rank}) for rank in ranks]
    variants = [replace(workload, method=method) for method in methods]
    fitting = [x for x in variants if assess_fit(x, cluster).verdict == FITS]
    chosen = fitting[0] if fitting else variants[-1]
    return Suggestion((f"method.r={chosen.method.rank}",), "learns less", chosen, cluster)


def _checkpointing(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.checkpointing:
        return None
    changed = replace(workload, checkpointing=True)
    settings = ("model.gradient_checkpointing=true",)
    return Suggestion(settings, "a third more time", changed, cluster)


def _sharded(workload: Workload, shard: int) -> Workload:
    """The workload under the first engine that shards the base among a chosen number of ranks."""
    return replace(workload, engine=engines_with("shard_group")[0], shard=shard)


def _shard_in_node(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.capabilities.shards_base or workload.node_ranks == 1:
        return None
    changed = _sharded(workload, min(workload.node_ranks, workload.ranks))
    if not changed.supports_optimizer:
        return None
    setting = f"engine={{kind: {changed.engine}, shard: node}}"
    return Suggestion((setting,), "weights are sent inside each node", changed, cluster)


def _shard_among_all(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.shard >= workload.ranks or workload.ranks == 1:
        return None
    changed = _sharded(workload, workload.ranks)
    if not changed.supports_optimizer:
        return None
    return Suggestion((_among_all(changed),), "weights are sent between nodes", changed, cluster)


def _among_all(workload: Workload) -> str:
    """The recipe's key for an engine that shards the base among all ranks."""
    return f"engine={{kind: {workload.engine}}}"


def _shorter_sequences(workload: Workload, cluster: Cluster) -> Suggestion | None:
    half = workload.sequence_length // 2
    if half < 512:
        return None
    changed = replace(workload, sequence_length=half)
    return Suggestion((f"data.sequence_length={half}",), "shorter documents", changed, cluster)


def _quantized_base(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.traits.quantizes_base:
        return None
    method, setting = over_nf4(workload.method)
    changed = replace(workload, method=method)
    if workload.traits.trains_base:
        cost = "trains an adapter instead of every parameter"
    else:
        cost = "20-30 % slower, 1-3 % worse"
    return Suggestion((setting,), cost, changed, cluster)


def _more_nodes(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if not workload.capabilities.shards_base or workload.shard != workload.ranks:
        return None
    if workload.accumulation % 2:
        return None
    nodes, ranks, steps = 2 * cluster.nodes, 2 * workload.ranks, workload.accumulation // 2
    changed = replace(workload, ranks=ranks, shard=ranks, accumulation=steps)
    # On one node the recipe may shard inside of the node, which more nodes would not change.
    shard = (_among_all(changed),) if workload.capabilities.shard_group else ()
    settings = (*shard, f"--nodes {nodes}")
    return Suggestion(settings, "more GPUs", changed, replace(cluster, nodes=nodes))


def _offload(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.offload or workload.traits.quantizes_base:
        return None
    engine = engines_with("offload")[0]
    shard = workload.ranks if ENGINES[engine].shards_base else 1
    changed = replace(workload, engine=engine, shard=shard, offload=True)
    setting = f"engine={{kind: {engine}, offload: true}}"
    return Suggestion((setting,), "several times slower", changed, cluster)


def _larger_gpu(workload: Workload, cluster: Cluster) -> Suggestion | None:
    larger = [gpu for gpu in GPUS.values() if gpu.memory_gib > cluster.gpu.memory_gib]
    for gpu in sorted(larger, key=lambda x: (x.memory_gib, -x.tflops)):
        settings = (f"--gpu {gpu.name}",)
        changed = Suggestion(settings, "larger GPUs", workload, replace(cluster, gpu=gpu))
        if changed.fits:
            return changed
    return None


Change = Callable[[Workload, Cluster], Suggestion | None]
CHANGES: dict[Change, int] = {
    _smaller_micro_batch: 1,
    _checkpointing: 3,
    _shard_in_node: 3,
    _shard_among_all: 4,
    _lower_rank: 5,
    _shorter_sequences: 6,
    _quantized_base: 6,
    _more_nodes: 10,
    _offload: 12,
    _larger_gpu: 20,
}
"""The changes that the plan knows, cheapest first, with prices to compare their combinations by."""
SIZED: tuple[Change, ...] = (_smaller_micro_batch, _lower_rank)
"""The changes that choose a size, the largest that fits."""
