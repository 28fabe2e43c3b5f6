"""How entries of a model are made of the tensors in its files, and these of the entries.

transformers' rules say how to make entries. What they move where is probed with numbers in place of
values, so that nothing here knows an operation by its name; the same result leads from the entries
back to the files. A rule that does more than to move values is found by its result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.core_model_loading import WeightConverter

from dtrain.core.errors import UserError, first_line
from dtrain.distributed.out_of_memory import is_out_of_memory

COLUMNS = 8  # of a probe that moves rows
SAME_MODEL = "weights and config.json must belong to the same model; download them again"
EXPERTS = 3  # of a probe: a prime number, so that nothing divides them


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors of the files that are stacked, joined, split or transposed into entries of the model.

    Attributes:
        entries: names in the model of what it makes.
        empty: the model's tensors of these names; some rules ask for their shapes.
        sources: pattern of the rule → names in the files, in the order of the rule.
        rule: of transformers.
    """

    entries: tuple[str, ...]
    empty: dict[str, Tensor]
    sources: dict[str, list[str]]
    rule: WeightConverter
    config: PretrainedConfig

    @property
    def names(self) -> list[str]:
        """Names in the files."""
        return [name for names in self.sources.values() for name in names]

    @property
    def operations(self) -> str:
        """transformers' names of what it does, for messages."""
        return ", ".join(type(operation).__name__ for operation in self.rule.operations)

    def convert(
        self, read: Callable[[str], Tensor], empty: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Make the entries.

        Args:
            read: name in the files → the tensor.
            empty: in place of the model's, for tensors of other shapes.

        Raises:
            UserError: the tensors do not fit together.
        """
        rule, first = deepcopy(self.rule), self.entries[0]
        for pattern, names in self.sources.items():
            for name in names:
                rule.add_tensor(first, name, pattern, partial(read, name))  # type: ignore[arg-type]
        try:
            model: Any = SimpleNamespace(get_parameter=(empty or self.empty).__getitem__)
            entries: dict[str, Any] = rule.convert(first, model=model, config=self.config)
        except Exception as error:  # torch's, on tensors of other shapes
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"the files' tensors do not make {first}: {first_line(error)}",
                fix=SAME_MODEL,
            ) from error
        return {name: v[0] if isinstance(v, list) else v for name, v in entries.items()}

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that the files' tensors make entries of the model's shapes; none is read.

        Args:
            shapes: of the files' tensors, by name.

        Raises:
            UserError: they do not.
        """
        try:
            made = self.convert(lambda name: torch.empty(*shapes[name], device="meta"))
        except UserError as error:
            if odd := self._find_odd(shapes):
                raise UserError(odd, fix=error.fix) from error
            raise
        for entry, empty in self.empty.items():
            stored, expected = list(made[entry].shape), list(empty.shape)
            if stored == expected:
                continue
            first, *others = self.names
            message = f"{first} {list(shapes[first])} and {len(others)} others in the files make "
            message += f"{entry} {stored}, but it is {expected} by config.json"
            if stored[1:] == expected[1:] and expert_parts(self):
                experts = f"{stored[0]} experts in the files, but {expected[0]} by config.json"
                message = f"{entry} has {experts}"
            raise UserError(message, fix=SAME_MODEL)

    def _find_odd(self, shapes: Mapping[str, Sequence[int]]) -> str:
        """What is wrong with tensors that do not fit together; empty if it is not obvious."""
        for names in self.sources.values():
            counts = Counter(tuple(shapes[name]) for name in names)
            (usual, _), *others = counts.most_common()
            if others:
                odd = next(name for name in names if tuple(shapes[name]) != usual)
                return f"{odd} is {list(shapes[odd])} in the files, others of its kind {[*usual]}"
        by_count = sorted(self.sources.values(), key=len)
        fewest, most = by_count[0], by_count[-1]
        if len(most) == len(fewest):
            return ""
        theirs = f"{len(fewest)} like {fewest[-1]}"
        return f"the files have {len(most)} tensors like {most[-1]}, but {theirs}"


def check_conversions(
    folder: Path, conversions: Iterable[Conversion], tensors: Mapping[str, Any]
) -> None:
    """Check that the files' tensors of another layout make the model's; none is read.

    Args:
        tensors: of the files, by name; only their shapes count.

    Raises:
        UserError: they do not.
    """
    checked = set[object]()
    for conversion in conversions:
        shapes = {name: tensors[name].shape for name in conversion.names}
        made = tuple(empty.shape for empty in conversion.empty.values())
        by_pattern = tuple(map(len, conversion.sources.values()))
        kind = id(conversion.rule), by_pattern, tuple(shapes.values()), made
        if kind in checked:  # layers that are alike
            continue
        checked.add(kind)
        try:
            conversion.check_shapes(shapes)
        except UserError as error:
            raise UserError(error.message, where=str(folder), fix=error.fix) from error


@dataclass(frozen=True)
class ExpertPart:
    """A matrix in the files that is a range of rows of one expert.

    Attributes:
        name: in the files.
        expert: number of the expert.
        share: which of the equal ranges of its rows, and of how many.
    """

    name: str
    expert: int
    share: tuple[int, int]


def expert_parts(conversion: Conversion) -> dict[str, list[ExpertPart]]:
    """The parts of parameters [E, rows, columns] that a conversion makes of matrices, by entry.

    The conversion itself is probed, with small matrices of numbers that say where they come from.

    Returns:
        Nothing if it does something else than to stack experts and to join their rows.
    """
    names = conversion.names
    numbered = {n: torch.arange(4).view(2, 2) + 4 * i for i, n in enumerate(names)}
    try:
        entries = conversion.convert(numbered.__getitem__)
    except UserError:
        return {}
    parts: dict[str, list[ExpertPart]] = {}
    for entry, values in entries.items():
        if values.dim() != 3 or values.shape[2] != 2 or values.shape[1] % 2:
            return {}
        pairs = values.flatten(1).view(len(values), -1, 4)  # [E, matrices, 4]
        if not torch.equal(pairs - pairs[..., :1], torch.arange(4).expand_as(pairs)):
            return {}
        for expert, matrices in enumerate((pairs[..., 0] // 4).tolist()):
            for at, number in enumerate(matrices):
                part = ExpertPart(names[number], expert, (at, len(matrices)))
                parts.setdefault(entry, []).append(part)
    every = sorted(part.name for of_entry in parts.values() for part in of_entry)
    return parts if every == sorted(names) else {}


@dataclass(frozen=True)
class Moves:
    """Where the values of a conversion's entries are in the files' tensors.

    Attributes:
        positions: entry → rows, or elements, of the joined tensors of the files.
        shapes: name in the files → shape.
        width: elements that move together.
        by_expert: the positions are those of one expert; all first dimensions number experts.
    """

    positions: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    width: int
    by_expert: bool

    def revert(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the files' tensors of all entries; with `by_expert`, of some of the experts."""
        first = next(iter(entries.values()))
        count = len(first) if self.by_expert else 1
        dtypes = {values.dtype for values in entries.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        units = sum(len(at) for at in self.positions.values())
        joined = torch.empty(count, units, self.width, dtype=dtype)
        for entry, at in self.positions.items():
            joined[:, at] = entries[entry].reshape(count, -1, self.width).to(dtype)
        shapes = {n: s[1:] if self.by_expert else s for n, s in self.shapes.items()}
        tensors = joined.split([prod(shape) // self.width for shape in shapes.values()], dim=1)
        lead = (count,) if self.by_expert else ()
        pairs = zip(shapes.items(), tensors, strict=True)
        return {name: values.reshape(*lead, *shape) for (name, shape), values in pairs}

    def renamed(self, entries: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Moves:
        """The same of another layer.

        Args:
            entries, shapes: as in the first, in the same order.
        """
        positions = zip(entries, self.positions.values(), strict=True)
        return replace(self, positions=dict(positions), shapes=shapes)

    @property
    def is_identity(self) -> bool:
        """Whether the one tensor of the files is the one entry as it is."""
        at = next(iter(self.positions.values()))
        single = len(self.positions) == len(self.shapes) == 1
        return single and torch.equal(at, torch.arange(len(at)))


def find_moves(conversion: Conversion, shapes: Mapping[str, Sequence[int]]) -> Moves:
    """Probe what a conversion moves where: by expert or whole, by rows or by elements.

    Args:
        shapes: of the files' tensors, by name.

    Raises:
        UserError: it does not only move values, or makes other shapes than the model has.
    """
    stored = {name: tuple(shapes[name]) for name in conversion.names}
    for by_expert in (True, False):
        for by_row in (True, False):
            try:
                moves = _probe(conversion, stored, by_expert, by_row)
            except (UserError, ValueError):
                if by_expert or by_row:
                    continue
                raise
            if moves is not None:
                return moves
    raise UserError(f"{conversion.operations} does more than to move values")


def _probe(
    conversion: Conversion, stored: Mapping[str, tuple[int, ...]], by_expert: bool, by_row: bool
) -> Moves | None:
    """The moves, if the conversion leaves experts, or rows, as they are."""
    models = {name: tuple(tensor.shape) for name, tensor in conversion.empty.items()}
    everything = [*stored.values(), *models.values()]
    counts, columns = {shape[0] for shape in everything if shape}, {s[-1] for s in everything if s}
    if not all(everything) or (by_expert and (min(map(len, everything)) < 3 or len(counts) > 1)):
        return None
    if by_row and (min(map(len, everything)) < 2 or len(columns) > 1 or columns <= {*range(9)}):
        return None
    unit = COLUMNS if by_row else 1

    def probe_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
        shape = (EXPERTS, *shape[1:]) if by_expert else shape
        return (*shape[:-1], COLUMNS) if by_row else shape

    numbered, at = dict[str, Tensor](), 0
    for name, shape in stored.items():
        probed = probe_shape(shape)
        size = prod(probed[1:] if by_expert else probed)
        values = torch.arange(at, at := at + size).expand(EXPERTS if by_expert else 1, size)
        numbered[name] = values.clone().view(probed)
    if by_expert:  # the numbers of one expert follow those of another
        for values in numbered.values():
            values += at * torch.arange(EXPERTS).view(-1, *[1] * (values.dim() - 1))
    empty = {name: torch.empty(probe_shape(s), device="meta") for name, s in models.items()}
    entries = conversion.convert(numbered.__getitem__, empty)
    positions = dict[str, Tensor]()
    for entry, values in entries.items():
        if entry in empty and values.shape != empty[entry].shape:
            message = f"the files' tensors make {list(values.shape)} of {entry}"
            raise UserError(f"{message}, and config.json says {list(empty[entry].shape)}")
        if by_expert and not _repeats(values, at):
            return None
        units = (values[0] if by_expert else values).reshape(-1, unit)
        if not torch.equal(units - units[:, :1], torch.arange(unit).expand_as(units)):
            return None
        if (units[:, 0] % unit).any():
            return None
        positions[entry] = units[:, 0] // unit
    if positions.keys() != set(conversion.entries):
        return None
    positions = {entry: positions[entry] for entry in conversion.entries}
    every = torch.cat([*positions.values()]).sort().values
    if not torch.equal(every, torch.arange(at // unit)):
        return None
    width = columns.pop() if by_row else 1
    return Moves(positions, stored, width, by_expert)


def _repeats(values: Tensor, step: int) -> bool:
    """Whether each expert has the numbers of the first, moved by a step for each."""
    if len(values) != EXPERTS:
        return False
    steps = step * torch.arange(EXPERTS).view(-1, *[1] * (values.dim() - 1))
    return torch.equal(values, values[:1] + steps)
