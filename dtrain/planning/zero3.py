"""Which weights ZeRO-3 gathers, when, and how long it keeps them: DeepSpeed's rules played out.

DeepSpeed records in which order modules ask for parameters. From then on, whenever a module begins,
it gathers what is missing (one flat buffer, copied out when it is waited for, and let go of when
the last of its parameters was asked for), then as many of the next ones as `prefetch` and `live`
allow. A module that ends gives back what is not needed again within `reuse` elements. Read from
deepspeed/runtime/zero/partitioned_param_coordinator.py and partition_parameters.py; compared with
real ranks (tests/distributed/test_plan_real.py).

All numbers are elements, of what is gathered beyond a rank's own share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from dtrain.planning.parameters import layer_parameters, outer_parameters
from dtrain.planning.workload import Workload

MODULES = 12  # in a decoder layer: each begins, and so prefetches
ROOTS = {True: 2, False: 4}  # modules around the embeddings in full training, and with PEFT's
FORWARD, LOSS, BACKWARD, END = "forward", "loss", "backward", "end"
ARRIVAL = "arrival"


@dataclass(frozen=True)
class ModelSizes:
    """DeepSpeed's, by their names in its file without `stage3_`."""

    prefetch: int
    persistent: int
    live: int
    reuse: int


@dataclass(frozen=True)
class Moment:
    """The most that is gathered in a part of a micro-batch.

    Attributes:
        phase: forward, loss, backward or end; arrival: weights are copied, nothing computes yet.
        depth: the decoder layer, from 1; how many have left activations.
    """

    phase: str
    depth: int
    elements: int


@dataclass(frozen=True)
class Gathered:
    """A micro-batch.

    Attributes:
        received: that all its gathers bring together, a rank's own share among them.
        persistent: of small parameters, whole at all times, gathered after each update.
    """

    moments: tuple[Moment, ...]
    received: int
    persistent: int


def gathered(workload: Workload) -> Gathered:
    """What ZeRO-3 gathers for a micro-batch of this stage."""
    return _played(
        tuple(one.elements for one in layer_parameters(workload)),
        tuple(one.elements for one in outer_parameters(workload)),
        workload.shape.layers,
        workload.shape.tied,
        workload.is_full,
        workload.shard,
        ModelSizes(
            workload.prefetch_elements,
            workload.persistent_elements,
            workload.live_elements,
            workload.reuse_elements,
        ),
    )


@dataclass(frozen=True)
class _Visit:
    """A module begins, asks for parameters by their numbers, and ends before the next begins."""

    phase: str
    depth: int
    wanted: tuple[int, ...]
    modules: int  # that begin in it


@lru_cache(maxsize=256)
def _played(
    layer: tuple[int, ...],
    outer: tuple[int, ...],
    layers: int,
    tied: bool,
    is_full: bool,
    ranks: int,
    sizes: ModelSizes,
) -> Gathered:
    embedding, norm, *rest = range(len(outer))
    head = tuple(rest) if not tied else (embedding, *rest)
    blocks = [
        tuple(range(len(outer) + i * len(layer), len(outer) + (i + 1) * len(layer)))
        for i in range(layers)
    ]
    numbers = [*outer, *layer * layers]
    small = {n for n, size in enumerate(numbers) if size <= sizes.persistent}
    visits = list(_visits(blocks, embedding, norm, head, is_full))
    visits = [
        _Visit(v.phase, v.depth, tuple(n for n in v.wanted if n not in small), v.modules)
        for v in visits
    ]
    play = _Play(numbers, visits, ranks, sizes)
    found = tuple(_greatest(list(play.run())))
    return Gathered(found, play.received, sum(numbers[n] for n in small))


def _greatest(moments: Sequence[Moment]) -> Iterator[Moment]:
    """Of each phase, those with more gathered than any that is as deep."""
    most: dict[str, int] = {}
    for moment in sorted(moments, key=lambda one: (-one.depth, -one.elements)):
        if moment.elements > most.get(moment.phase, -1):
            most[moment.phase] = moment.elements
            yield moment


def _visits(
    blocks: Sequence[tuple[int, ...]],
    embedding: int,
    norm: int,
    head: tuple[int, ...],
    is_full: bool,
) -> Iterator[_Visit]:
    last = len(blocks)
    yield _Visit(FORWARD, 0, (), ROOTS[is_full])
    yield _Visit(FORWARD, 0, (embedding,), 2)
    for depth, block in enumerate(blocks, start=1):
        yield _Visit(FORWARD, depth, block, MODULES)
    yield _Visit(ARRIVAL, last, (norm,), 1)
    yield _Visit(LOSS, last, head, 1)
    yield _Visit(ARRIVAL, last, head, 1)
    yield _Visit(ARRIVAL, last, (norm,), 1)
    for depth, block in reversed(list(enumerate(blocks, start=1))):
        yield _Visit(BACKWARD, depth, block, MODULES)
    yield _Visit(END, 0, (embedding,) if is_full else (), 1)


class _Buffer:
    """A gather of several parameters.

    Attributes:
        left: of them that no module has asked for yet.
    """

    def __init__(self, numbers: Sequence[int], size: int) -> None:
        self.numbers, self.size = numbers, size
        self.left, self.is_copied_out = len(numbers), False


class _Play:
    """The state of DeepSpeed's coordinator while a micro-batch goes by."""

    def __init__(
        self, numbers: Sequence[int], visits: Sequence[_Visit], ranks: int, sizes: ModelSizes
    ) -> None:
        self._elements, self._visits, self._ranks, self._sizes = numbers, visits, ranks, sizes
        self._queue = deque((n, step) for step, v in enumerate(visits) for n in v.wanted)
        self._read_until: dict[int, int] = {}  # the last use that prefetching has seen
        self._next_use = _next_uses(visits)
        walked = [sum(numbers[n] for n in v.wanted) for v in visits]
        self._walked = [0, *accumulate(walked)]  # elements asked for before a step
        self._here: set[int] = set()
        self._coming: dict[int, _Buffer] = {}
        self._asked = 0  # elements here or coming, as DeepSpeed counts them
        self._held = self._peak = self.received = 0

    def run(self) -> Iterator[Moment]:
        """The peaks of each visit."""
        for step, visit in enumerate(self._visits):
            self._peak = self._held
            self._fetch(visit.wanted)
            before = visit.depth - (visit.phase == FORWARD and visit.depth > 0)
            yield Moment(ARRIVAL, before, self._peak)
            self._peak = self._held
            self._read(step, visit.wanted)
            for _ in range(visit.modules):
                self._prefetch()
            yield Moment(visit.phase, visit.depth, self._peak)
            self._release(step, visit.wanted)

    def _hold(self, elements: int) -> None:
        self._held += elements
        self._peak = max(self._peak, self._held)

    def _gather(self, wanted: Sequence[int]) -> None:
        missing = [n for n in wanted if n not in self._here and n not in self._coming]
        if not missing:
            return
        self._asked += sum(self._elements[n] for n in missing)
        size = sum(-(-self._elements[n] // self._ranks) * self._ranks for n in missing)
        self.received += size
        buffer = _Buffer(missing, size)
        buffer.is_copied_out = len(missing) == 1  # it is the parameter
        self._coming |= dict.fromkeys(missing, buffer)
        self._hold(size)

    def _fetch(self, wanted: Sequence[int]) -> None:
        """Wait for what a module asks for; in any order, so that no buffer goes before the last."""
        self._gather(wanted)
        coming = [self._coming.pop(n) for n in wanted if n in self._coming]
        for buffer in coming:
            if not buffer.is_copied_out:
                self._hold(sum(self._elements[n] for n in buffer.numbers))
                buffer.is_copied_out = True
            self._here.update(buffer.numbers)
        for buffer in coming:
            buffer.left -= 1
            if not buffer.left and len(buffer.numbers) > 1:
                self._held -= buffer.size

    def _read(self, step: int, wanted: Sequence[int]) -> None:
        """Take this visit's entries off the queue."""
        left = {n for n in wanted if self._read_until.get(n, -1) < step}
        while left:
            number, used = self._queue.popleft()
            self._read_until[number] = used
            left.discard(number)

    def _prefetch(self) -> None:
        room = min(self._sizes.live - self._asked, self._sizes.prefetch)
        chosen: list[int] = []
        taken = 0
        while self._queue and taken < room:
            number, used = self._queue.popleft()
            self._read_until[number] = max(self._read_until.get(number, -1), used)
            if number not in self._here and number not in self._coming and number not in chosen:
                chosen.append(number)
                taken += self._elements[number]
        self._gather(chosen)

    def _release(self, step: int, wanted: Sequence[int]) -> None:
        for number in wanted:
            again = self._next_use.get((step, number))
            if self._read_until[number] > step:
                continue
            if again and self._walked[again] - self._walked[step + 1] < self._sizes.reuse:
                continue
            self._here.discard(number)
            self._asked -= self._elements[number]
            self._held -= self._elements[number]


def _next_uses(visits: Sequence[_Visit]) -> dict[tuple[int, int], int]:
    """Step and parameter → the step that asks for it again."""
    found: dict[tuple[int, int], int] = {}
    later: dict[int, int] = {}
    for step in range(len(visits) - 1, -1, -1):
        for number in visits[step].wanted:
            if number in later:
                found[step, number] = later[number]
            later[number] = step
    return found
