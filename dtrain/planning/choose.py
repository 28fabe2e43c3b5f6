"""Engines and methods side by side, and which of them `auto` takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dtrain.core.units import size
from dtrain.planning.memory import memory_of
from dtrain.planning.setup import Cluster, Setup
from dtrain.planning.speed import tokens_per_second
from dtrain.planning.verdict import FITS, ORDER, TIGHT, Verdict, verdict_of
from dtrain.planning.wire import entering_bytes, received_bytes

METHODS = ("full", "lora", "qlora")
NEARLY = 0.97  # of the best speed: less memory is better then
MOST_MICRO_TOKENS = 16_384  # more tokens at once keep no GPU busier


@dataclass(frozen=True)
class Option:
    """A way to run a stage."""

    setup: Setup
    verdict: Verdict
    speed: float
    reason: str

    @property
    def engine(self) -> str:
        """As a person says it: fsdp2 tells who shares a copy."""
        setup = self.setup
        if setup.engine != "fsdp2" or setup.ranks == setup.node_ranks:
            return setup.engine
        return "fsdp2 all" if setup.shard == setup.ranks else "fsdp2 node"


def options(setup: Setup, cluster: Cluster) -> list[Option]:
    """Every engine with every method, the best first: what fits, the recipe's method, the speed."""
    found = [
        option
        for method in METHODS
        for variant in _engines(_with_method(setup, method), cluster)
        if (option := _best_micro_batch(variant, cluster))
    ]
    return sorted(
        found,
        key=lambda one: (
            ORDER.index(one.verdict.word),
            one.setup.method != setup.method,
            -one.speed,
        ),
    )


def _with_method(setup: Setup, method: str) -> Setup:
    if method == setup.method:
        return setup
    if method == "full":
        return replace(setup, method=method, rank=0, has_dropout=False)
    return replace(setup, method=method, rank=setup.rank or 16, has_dropout=True)


def _engines(setup: Setup, cluster: Cluster) -> list[Setup]:
    """The setup under each engine that could run it; who sends least stands first."""
    ranks, node = setup.ranks, setup.node_ranks
    found = [replace(setup, engine="ddp", shard=1, offload=False)]
    if setup.optimizer != "adamw" or ranks == 1:
        return found
    found.append(replace(setup, engine="zero2", shard=1, offload=False))
    if 1 < node < ranks:
        found.append(replace(setup, engine="fsdp2", shard=node, offload=False))
    found.append(replace(setup, engine="fsdp2", shard=ranks, offload=False))
    found.append(replace(setup, engine="zero3", shard=ranks, offload=setup.offload))
    return found


def micro_batches(setup: Setup) -> list[int]:
    """Sequences at once that divide a rank's share of the global batch, the smallest first."""
    share = setup.micro_batch * setup.accumulation
    most = max(1, MOST_MICRO_TOKENS // setup.sequence_tokens)
    return [n for n in range(1, share + 1) if share % n == 0 and n <= most]


def _best_micro_batch(setup: Setup, cluster: Cluster) -> Option:
    """The smallest micro-batch that is nearly as fast as any that fits; 1 where none does."""
    share = setup.micro_batch * setup.accumulation
    tried = [
        option_of(replace(setup, micro_batch=n, accumulation=share // n), cluster)
        for n in micro_batches(setup)
    ]
    fitting = [one for one in tried if one.verdict.word == FITS] or tried[:1]
    best = max(one.speed for one in fitting)
    return next(one for one in fitting if one.speed >= NEARLY * best)


def option_of(setup: Setup, cluster: Cluster) -> Option:
    """A setup with its verdict, speed and the reason that speaks for or against it."""
    verdict = verdict_of(setup, cluster)
    speed = tokens_per_second(setup, cluster).middle
    return Option(setup, verdict, speed, _reason(setup, cluster, verdict))


def _reason(setup: Setup, cluster: Cluster, verdict: Verdict) -> str:
    if verdict.word != FITS:
        name = max(memory_of(setup).terms().items(), key=lambda item: item[1])[0]
        return f"+{size(verdict.budget - verdict.usable)}, {name}"
    if cluster.nodes > 1:
        return f"{size(entering_bytes(setup))} to a node"
    return f"{size(received_bytes(setup))} to a GPU"


def choose(setup: Setup, cluster: Cluster, *, any_engine: bool, any_micro: bool) -> Setup:
    """What `engine.kind: auto` and `micro_batch_sequences: auto` become.

    Of what fits, the simplest engine that is nearly the fastest; if nothing does, the smallest.
    """
    variants = _engines(setup, cluster) if any_engine else [setup]
    if any_micro:
        tried = [_best_micro_batch(one, cluster) for one in variants]
    else:
        tried = [option_of(one, cluster) for one in variants]
    for word in (FITS, TIGHT):
        fitting = [one for one in tried if one.verdict.word == word]
        if fitting:
            best = max(one.speed for one in fitting)
            return next(one.setup for one in fitting if one.speed >= NEARLY * best)
    return min(tried, key=lambda one: one.verdict.budget).setup
