"""Which weights ZeRO-3 gathers, when, and how long it keeps them: a simulation of DeepSpeed.

DeepSpeed records in which order modules use parameters. From then on, when a module begins, it
gathers what is missing (into one flat buffer, which is copied out when it is waited for, and freed
when the last of its parameters has been used), then as many of the next parameters as the prefetch
and live limits allow. When a module ends, it frees what is not used again within the reuse limit.

Source: deepspeed/runtime/zero/partitioned_param_coordinator.py and partition_parameters.py; a test
compares with real ranks (tests/distributed/test_plan_real.py).

All sizes are elements of what is gathered beyond a rank's own share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

from dtrain.planning.parameters import layer_parameters, outer_parameters
from dtrain.planning.workload import Workload

LAYER_MODULES = 12  # modules of a decoder layer: each begins, and so prefetches
ROOT_MODULES = {True: 2, False: 4}  # modules around the embeddings; more with PEFT's wrappers
FORWARD, LOSS, BACKWARD, END = "forward", "loss", "backward", "end"
ARRIVAL = "arrival"


@dataclass(frozen=True)
class GatherLimits:
    """DeepSpeed's limits in elements, named as in its file without `stage3_`."""

    prefetch: int
    persistent: int
    live: int
    reuse: int


@dataclass(frozen=True)
class GatherPeak:
    """The most that is gathered in one phase of a micro-batch.

    Attributes:
        phase: forward, loss, backward or end; arrival: weights are copied, nothing computes yet.
        depth: decoder layer, counted from 1, which is how many layers have saved activations.
    """

    phase: str
    depth: int
    elements: int


@dataclass(frozen=True)
class GatherSchedule:
    """What ZeRO-3 gathers in one micro-batch.

    Attributes:
        received: elements that all gathers bring together, including a rank's own share.
        persistent: elements of small parameters, which stay whole and are gathered once a step.
    """

    peaks: tuple[GatherPeak, ...]
    received: int
    persistent: int


def simulate_gathers(workload: Workload) -> GatherSchedule:
    """Simulate what ZeRO-3 gathers in a micro-batch of a workload."""
    limits = GatherLimits(
        workload.prefetch_elements,
        workload.persistent_elements,
        workload.live_elements,
        workload.reuse_elements,
    )
    elements = {
        replace(kind.shape, layers=1): tuple(x.elements for x in layer_parameters(kind))
        for kind in workload.kinds
    }
    return _simulate(
        tuple(elements[block] for block in workload.shape.each_layer),
        tuple(x.elements for x in outer_parameters(workload)),
        workload.shape.tied,
        workload.traits.trains_base,
        workload.shard,
        limits,
    )


@dataclass(frozen=True)
class _Visit:
    """Modules that begin, use the parameters with these indices, and end before the next visit."""

    phase: str
    depth: int
    parameters: tuple[int, ...]
    modules: int


@lru_cache(maxsize=256)
def _simulate(
    layers: tuple[tuple[int, ...], ...],
    outer: tuple[int, ...],
    tied: bool,
    trains_base: bool,
    ranks: int,
    limits: GatherLimits,
) -> GatherSchedule:
    embedding, norm, *rest = range(len(outer))
    head = (embedding, *rest) if tied else tuple(rest)
    sizes = [*outer, *(size for layer in layers for size in layer)]
    starts = accumulate((len(layer) for layer in layers), initial=len(outer))
    blocks = [tuple(range(start, end)) for start, end in pairwise(starts)]
    persistent = {i for i, size in enumerate(sizes) if size <= limits.persistent}
    visits = [
        replace(visit, parameters=tuple(i for i in visit.parameters if i not in persistent))
        for visit in _visits(blocks, embedding, norm, head, trains_base)
    ]
    coordinator = _Coordinator(sizes, visits, ranks, limits)
    peaks = tuple(_undominated(list(coordinator.run())))
    return GatherSchedule(peaks, coordinator.received, sum(sizes[i] for i in persistent))


def _undominated(peaks: Sequence[GatherPeak]) -> Iterator[GatherPeak]:
    """The peaks of each phase that are greater than every deeper one."""
    greatest: dict[str, int] = {}
    for peak in sorted(peaks, key=lambda x: (-x.depth, -x.elements)):
        if peak.elements > greatest.get(peak.phase, -1):
            greatest[peak.phase] = peak.elements
            yield peak


def _visits(
    blocks: Sequence[tuple[int, ...]],
    embedding: int,
    norm: int,
    head: tuple[int, ...],
    trains_base: bool,
) -> Iterator[_Visit]:
    last = len(blocks)
    yield _Visit(FORWARD, 0, (), ROOT_MODULES[trains_base])
    yield _Visit(FORWARD, 0, (embedding,), 2)
    for depth, block in enumerate(blocks, start=1):
        yield _Visit(FORWARD, depth, block, LAYER_MODULES)
    yield _Visit(ARRIVAL, last, (norm,), 1)
    yield _Visit(LOSS, last, head, 1)
    yield _Visit(ARRIVAL, last, head, 1)
    yield _Visit(ARRIVAL, last, (norm,), 1)
    for depth, block in reversed(list(enumerate(blocks, start=1))):
        yield _Visit(BACKWARD, depth, block, LAYER_MODULES)
    yield _Visit(END, 0, (embedding,) if trains_base else (), 1)


class _Buffer:
    """One gather of several parameters.

    Attributes:
        unused: how many of them no module has used yet.
        is_copied: they were copied out of the buffer.
    """

    def __init__(self, parameters: Sequence[int], size: int) -> None:
        self.parameters, self.size = parameters, size
        self.unused = len(parameters)
        self.is_copied = len(parameters) == 1  # then the buffer is the parameter


class _Coordinator:
    """The state of DeepSpeed's parameter coordinator during a micro-batch."""

    def __init__(
        self, sizes: Sequence[int], visits: Sequence[_Visit], ranks: int, limits: GatherLimits
    ) -> None:
        self._sizes, self._visits, self._ranks, self._limits = sizes, visits, ranks, limits
        self._queue = deque((i, step) for step, v in enumerate(visits) for i in v.parameters)
        self._read_until: dict[int, int] = {}  # the last use that prefetching has seen
        self._next_use = _next_uses(visits)
        used = [sum(sizes[i] for i in v.parameters) for v in visits]
        self._used_before = [0, *accumulate(used)]  # elements used before a step
        self._present: set[int] = set()
        self._pending: dict[int, _Buffer] = {}
        self._live = 0  # elements present or pending, as DeepSpeed counts them
        self._gathered = self._peak = self.received = 0

    def run(self) -> Iterator[GatherPeak]:
        """Yield the peaks of each visit."""
        for step, visit in enumerate(self._visits):
            self._peak = self._gathered
            self._fetch(visit.parameters)
            depth_before = visit.depth - (visit.phase == FORWARD and visit.depth > 0)
            yield GatherPeak(ARRIVAL, depth_before, self._peak)
            self._peak = self._gathered
            self._advance_queue(step, visit.parameters)
            for _ in range(visit.modules):
                self._prefetch()
            yield GatherPeak(visit.phase, visit.depth, self._peak)
            self._release(step, visit.parameters)

    def _allocate(self, elements: int) -> None:
        self._gathered += elements
        self._peak = max(self._peak, self._gathered)

    def _gather(self, parameters: Sequence[int]) -> None:
        missing = [i for i in parameters if i not in self._present and i not in self._pending]
        if not missing:
            return
        self._live += sum(self._sizes[i] for i in missing)
        size = sum(-(-self._sizes[i] // self._ranks) * self._ranks for i in missing)
        self.received += size
        self._pending |= dict.fromkeys(missing, _Buffer(missing, size))
        self._allocate(size)

    def _fetch(self, parameters: Sequence[int]) -> None:
        """Wait for a module's parameters; a buffer is freed only after all were copied."""
        self._gather(parameters)
        buffers = [self._pending.pop(i) for i in parameters if i in self._pending]
        for buffer in buffers:
            if not buffer.is_copied:
                self._allocate(sum(self._sizes[i] for i in buffer.parameters))
                buffer.is_copied = True
            self._present.update(buffer.parameters)
        for buffer in buffers:
            buffer.unused -= 1
            if not buffer.unused and len(buffer.parameters) > 1:
                self._gathered -= buffer.size

    def _advance_queue(self, step: int, parameters: Sequence[int]) -> None:
        """Remove this visit's entries from the queue."""
        unread = {i for i in parameters if self._read_until.get(i, -1) < step}
        while unread:
            index, used = self._queue.popleft()
            self._read_until[index] = used
            unread.discard(index)

    def _prefetch(self) -> None:
        allowed = min(self._limits.live - self._live, self._limits.prefetch)
        chosen: list[int] = []
        elements = 0
        while self._queue and elements < allowed:
            index, used = self._queue.popleft()
            self._read_until[index] = max(self._read_until.get(index, -1), used)
            if index not in self._present and index not in self._pending and index not in chosen:
                chosen.append(index)
                elements += self._sizes[index]
        self._gather(chosen)

    def _release(self, step: int, parameters: Sequence[int]) -> None:
        for index in parameters:
            next_use = self._next_use.get((step, index))
            if self._read_until[index] > step:
                continue
            if next_use:
                distance = self._used_before[next_use] - self._used_before[step + 1]
                if distance < self._limits.reuse:
                    continue
            self._present.discard(index)
            self._live -= self._sizes[index]
            self._gathered -= self._sizes[index]


def _next_uses(visits: Sequence[_Visit]) -> dict[tuple[int, int], int]:
    """(step, parameter) → the step that uses the parameter next."""
    next_uses: dict[tuple[int, int], int] = {}
    later: dict[int, int] = {}
    for step in range(len(visits) - 1, -1, -1):
        for index in visits[step].parameters:
            if index in later:
                next_uses[step, index] = later[index]
            later[index] = step
    return next_uses
