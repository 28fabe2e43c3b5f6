"""Whether a stage fits on a GPU, and the cheapest changes that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dtrain.planning.calibration import measured
from dtrain.planning.constants import BUDGET_BYTES, BUDGET_FACTOR, LOWER_BYTES, LOWER_FACTOR
from dtrain.planning.gpus import GPUS
from dtrain.planning.memory import estimate_memory, least_bytes
from dtrain.planning.workload import Cluster, Workload

FITS, TIGHT, DOES_NOT_FIT = "FITS", "TIGHT", "DOES NOT FIT"
ORDER = (FITS, TIGHT, DOES_NOT_FIT)


@dataclass(frozen=True)
class MemoryFit:
    """Bytes of one GPU against what it has.

    Attributes:
        lower: less than this it cannot take.
        budget: as much as it is likely to take at most.
        usable: what the GPU has.
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
    """Whether a stage fits, corrected by what earlier runs here took."""
    peak = estimate_memory(workload).peak
    known = measured(cluster.gpu.name, workload.engine, workload.method, peak)
    tensors = peak * (known.memory_factor if known else 1)
    lower = LOWER_FACTOR * least_bytes(workload) + LOWER_BYTES
    budget = BUDGET_FACTOR * tensors + BUDGET_BYTES
    return MemoryFit(lower, budget, cluster.gpu.usable_bytes)


@dataclass(frozen=True)
class Suggestion:
    """A way to another plan.

    Attributes:
        texts: what to change, as keys of the recipe or options of the plan.
        cost: what it costs, in words.
    """

    settings: tuple[str, ...]
    cost: str
    workload: Workload
    cluster: Cluster


Step = Callable[[Workload, Cluster], "Suggestion | None"]


def suggest_changes(workload: Workload, cluster: Cluster, most: int = 3) -> list[Suggestion]:
    """The cheapest changes that fit: single ones first, else as many together as it takes."""
    singles = [change for step in STEPS if (change := step(workload, cluster)) and _fits(change)]
    return singles[:most] if singles else list(_together(workload, cluster))


def suggest_reductions(workload: Workload, cluster: Cluster, most: int = 3) -> list[Suggestion]:
    """The cheapest changes that take less memory, whether the plan says that they fit or not."""
    now = _budget(Suggestion((), "", workload, cluster))
    made = [change for step in STEPS if (change := step(workload, cluster))]
    return [change for change in made if _budget(change) < now][:most]


def _together(workload: Workload, cluster: Cluster) -> Iterator[Suggestion]:
    settings: tuple[str, ...] = ()
    costs: list[str] = []
    for step in STEPS:
        change = step(workload, cluster)
        if change is None or _budget(change) >= _budget(Suggestion((), "", workload, cluster)):
            continue
        workload, cluster = change.workload, change.cluster
        settings, costs = (*settings, *change.settings), [*costs, change.cost]
        if _fits(change):
            yield Suggestion(settings, "; ".join(costs), workload, cluster)
            return


def _fits(change: Suggestion) -> bool:
    return assess_fit(change.workload, change.cluster).verdict == FITS


def _budget(change: Suggestion) -> float:
    """Share of the GPU that it takes."""
    fit = assess_fit(change.workload, change.cluster)
    return fit.budget / fit.usable


def _micro_batch(workload: Workload, cluster: Cluster) -> Suggestion | None:
    """The largest smaller micro-batch that fits, else 1."""
    together = workload.micro_batch * workload.accumulation
    smaller = [n for n in range(1, workload.micro_batch) if together % n == 0]
    if not smaller:
        return None
    tried = [replace(workload, micro_batch=n, accumulation=together // n) for n in smaller]
    fitting = [one for one in tried if assess_fit(one, cluster).verdict == FITS]
    chosen = fitting[-1] if fitting else tried[0]
    text = f"train.micro_batch_size={chosen.micro_batch}"
    return Suggestion((text,), "the same numbers, accumulated", chosen, cluster)


def _checkpointing(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.checkpointing:
        return None
    new = replace(workload, checkpointing=True)
    return Suggestion(("model.gradient_checkpointing=true",), "a third more time", new, cluster)


def _shard_node(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.is_sharded or workload.node_ranks == 1 or workload.optimizer != "adamw":
        return None
    shard = min(workload.node_ranks, workload.ranks)
    new = replace(workload, engine="fsdp2", shard=shard)
    return Suggestion(
        ("engine={kind: fsdp2, shard: node}",), "weights travel in nodes", new, cluster
    )


def _shard_all(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.shard >= workload.ranks or workload.optimizer != "adamw" or workload.ranks == 1:
        return None
    new = replace(workload, engine="fsdp2", shard=workload.ranks)
    return Suggestion(("engine={kind: fsdp2}",), "weights travel between nodes", new, cluster)


def _shorter(workload: Workload, cluster: Cluster) -> Suggestion | None:
    half = workload.sequence_length // 2
    if workload.micro_batch > 1 or half < 512:
        return None
    new = replace(workload, sequence_length=half)
    return Suggestion((f"data.sequence_length={half}",), "shorter documents", new, cluster)


def _qlora(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.method == "qlora":
        return None
    new = replace(workload, method="qlora", rank=workload.rank or 64, has_dropout=True)
    if workload.is_full:
        cost = "an adapter trains instead of every parameter"
    else:
        cost = "20-30 % slower, 1-3 % worse"
    return Suggestion(("method.kind=qlora",), cost, new, cluster)


def _offload(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if workload.offload or workload.method == "qlora":
        return None
    new = replace(workload, engine="zero3", shard=workload.ranks, offload=True)
    return Suggestion(
        ("engine={kind: zero3, offload: true}",), "several times slower", new, cluster
    )


def _more_nodes(workload: Workload, cluster: Cluster) -> Suggestion | None:
    if not workload.is_sharded:
        return None
    whole = workload.shard == workload.ranks
    nodes, ranks = 2 * cluster.nodes, 2 * workload.ranks
    if workload.accumulation % 2 or not whole:
        return None
    new = replace(workload, ranks=ranks, shard=ranks, accumulation=workload.accumulation // 2)
    return Suggestion((f"--nodes {nodes}",), "more GPUs", new, replace(cluster, nodes=nodes))


def _larger_gpu(workload: Workload, cluster: Cluster) -> Suggestion | None:
    gpu = cluster.gpu
    larger = [g for g in GPUS.values() if g.memory_gib > gpu.memory_gib]
    for one in sorted(larger, key=lambda g: (g.memory_gib, -g.tflops)):
        change = Suggestion(
            (f"--gpu {one.name}",), "larger GPUs", workload, replace(cluster, gpu=one)
        )
        if _fits(change):
            return change
    return None


STEPS: tuple[Step, ...] = (
    _micro_batch,
    _checkpointing,
    _shard_node,
    _shard_all,
    _shorter,
    _qlora,
    _more_nodes,
    _offload,
    _larger_gpu,
)
