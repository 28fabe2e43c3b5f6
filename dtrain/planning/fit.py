"""Whether a stage fits on a GPU, and the cheapest changes that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dtrain.planning.calibration import measured
from dtrain.planning.constants import BUDGET_BYTES, BUDGET_FACTOR, LOWER_BYTES, LOWER_FACTOR
from dtrain.planning.gpus import GPUS
from dtrain.planning.memory import least_bytes, memory_of
from dtrain.planning.workload import Cluster, Setup

FITS, TIGHT, DOES_NOT_FIT = "FITS", "TIGHT", "DOES NOT FIT"
ORDER = (FITS, TIGHT, DOES_NOT_FIT)


@dataclass(frozen=True)
class Verdict:
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
    def word(self) -> str:
        """FITS, TIGHT or DOES NOT FIT."""
        if self.budget <= self.usable:
            return FITS
        return TIGHT if self.lower <= self.usable else DOES_NOT_FIT


def verdict_of(setup: Setup, cluster: Cluster) -> Verdict:
    """Whether a stage fits, corrected by what earlier runs here took."""
    peak = memory_of(setup).peak
    known = measured(cluster.gpu.name, setup.engine, setup.method, peak)
    tensors = peak * (known.memory_factor if known else 1)
    lower = LOWER_FACTOR * least_bytes(setup) + LOWER_BYTES
    budget = BUDGET_FACTOR * tensors + BUDGET_BYTES
    return Verdict(lower, budget, cluster.gpu.usable_bytes)


@dataclass(frozen=True)
class Change:
    """A way to another plan.

    Attributes:
        texts: what to change, as keys of the recipe or options of the plan.
        cost: what it costs, in words.
    """

    texts: tuple[str, ...]
    cost: str
    setup: Setup
    cluster: Cluster


Step = Callable[[Setup, Cluster], "Change | None"]


def advice(setup: Setup, cluster: Cluster, most: int = 3) -> list[Change]:
    """The cheapest changes that fit: single ones first, else as many together as it takes."""
    singles = [change for step in STEPS if (change := step(setup, cluster)) and _fits(change)]
    return singles[:most] if singles else list(_together(setup, cluster))


def reductions(setup: Setup, cluster: Cluster, most: int = 3) -> list[Change]:
    """The cheapest changes that take less memory, whether the plan says that they fit or not."""
    now = _budget(Change((), "", setup, cluster))
    made = [change for step in STEPS if (change := step(setup, cluster))]
    return [change for change in made if _budget(change) < now][:most]


def _together(setup: Setup, cluster: Cluster) -> Iterator[Change]:
    texts: tuple[str, ...] = ()
    costs: list[str] = []
    for step in STEPS:
        change = step(setup, cluster)
        if change is None or _budget(change) >= _budget(Change((), "", setup, cluster)):
            continue
        setup, cluster = change.setup, change.cluster
        texts, costs = (*texts, *change.texts), [*costs, change.cost]
        if _fits(change):
            yield Change(texts, "; ".join(costs), setup, cluster)
            return


def _fits(change: Change) -> bool:
    return verdict_of(change.setup, change.cluster).word == FITS


def _budget(change: Change) -> float:
    """Share of the GPU that it takes."""
    verdict = verdict_of(change.setup, change.cluster)
    return verdict.budget / verdict.usable


def _micro_batch(setup: Setup, cluster: Cluster) -> Change | None:
    """The largest smaller micro-batch that fits, else 1."""
    together = setup.micro_batch * setup.accumulation
    smaller = [n for n in range(1, setup.micro_batch) if together % n == 0]
    if not smaller:
        return None
    tried = [replace(setup, micro_batch=n, accumulation=together // n) for n in smaller]
    fitting = [one for one in tried if verdict_of(one, cluster).word == FITS]
    chosen = fitting[-1] if fitting else tried[0]
    text = f"train.micro_batch_size={chosen.micro_batch}"
    return Change((text,), "the same numbers, accumulated", chosen, cluster)


def _checkpointing(setup: Setup, cluster: Cluster) -> Change | None:
    if setup.checkpointing:
        return None
    new = replace(setup, checkpointing=True)
    return Change(("model.gradient_checkpointing=true",), "a third more time", new, cluster)


def _shard_node(setup: Setup, cluster: Cluster) -> Change | None:
    if setup.is_sharded or setup.node_ranks == 1 or setup.optimizer != "adamw":
        return None
    shard = min(setup.node_ranks, setup.ranks)
    new = replace(setup, engine="fsdp2", shard=shard)
    return Change(("engine={kind: fsdp2, shard: node}",), "weights travel in nodes", new, cluster)


def _shard_all(setup: Setup, cluster: Cluster) -> Change | None:
    if setup.shard >= setup.ranks or setup.optimizer != "adamw" or setup.ranks == 1:
        return None
    new = replace(setup, engine="fsdp2", shard=setup.ranks)
    return Change(("engine={kind: fsdp2}",), "weights travel between nodes", new, cluster)


def _shorter(setup: Setup, cluster: Cluster) -> Change | None:
    half = setup.sequence_length // 2
    if setup.micro_batch > 1 or half < 512:
        return None
    new = replace(setup, sequence_length=half)
    return Change((f"data.sequence_length={half}",), "shorter documents", new, cluster)


def _qlora(setup: Setup, cluster: Cluster) -> Change | None:
    if setup.method == "qlora":
        return None
    new = replace(setup, method="qlora", rank=setup.rank or 64, has_dropout=True)
    if setup.is_full:
        cost = "an adapter trains instead of every parameter"
    else:
        cost = "20-30 % slower, 1-3 % worse"
    return Change(("method.kind=qlora",), cost, new, cluster)


def _offload(setup: Setup, cluster: Cluster) -> Change | None:
    if setup.offload or setup.method == "qlora":
        return None
    new = replace(setup, engine="zero3", shard=setup.ranks, offload=True)
    return Change(("engine={kind: zero3, offload: true}",), "several times slower", new, cluster)


def _more_nodes(setup: Setup, cluster: Cluster) -> Change | None:
    if not setup.is_sharded:
        return None
    whole = setup.shard == setup.ranks
    nodes, ranks = 2 * cluster.nodes, 2 * setup.ranks
    if setup.accumulation % 2 or not whole:
        return None
    new = replace(setup, ranks=ranks, shard=ranks, accumulation=setup.accumulation // 2)
    return Change((f"--nodes {nodes}",), "more GPUs", new, replace(cluster, nodes=nodes))


def _larger_gpu(setup: Setup, cluster: Cluster) -> Change | None:
    gpu = cluster.gpu
    larger = [g for g in GPUS.values() if g.memory_gib > gpu.memory_gib]
    for one in sorted(larger, key=lambda g: (g.memory_gib, -g.tflops)):
        change = Change((f"--gpu {one.name}",), "larger GPUs", setup, replace(cluster, gpu=one))
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
