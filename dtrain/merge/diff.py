"""Which tensors of two models differ, and by how much, a block at a time.

Where the two store a model in different layouts, such as with each expert by itself and with all in
one tensor, the entries of the model are compared that the tensors make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.log import progress
from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.verify import RAW_BYTES, model_tensors
from dtrain.models.peft_format import WEIGHTS
from dtrain.models.stored_tensors import (
    FLOAT_DTYPES,
    DecodedTensor,
    ModelTensors,
    StoredTensor,
    row_blocks,
)

FileTensor = StoredTensor | DecodedTensor


@dataclass(frozen=True)
class ConvertedTensor:
    """An entry of a model that its files have in another layout.

    Attributes:
        parts: the tensors of its experts, if each is stored by itself, in their order; of others
            all that is made together is in memory while it is compared.
    """

    entry: str
    conversion: Any
    parts: Sequence[Any]
    files: ModelTensors

    @property
    def dtype(self) -> str:
        """safetensors' name."""
        dtypes = {self.files[name].dtype for name in self.conversion.names}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the model."""
        return tuple(self.conversion.empty[self.entry].shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return a block of its rows, or experts."""
        if not self.parts:
            return self._whole[start:stop]
        names = [part.name for part in self.parts if start <= part.expert < stop]
        parts = [self.files[name].rows(0, self.files[name].shape[0]) for name in names]
        return torch.cat(parts).view(stop - start, *self.shape[1:])

    @cached_property
    def _whole(self) -> Tensor:
        values: Tensor = self.conversion.convert(self.files.read)[self.entry]
        return values


AnyTensor = FileTensor | ConvertedTensor
Open = Callable[[], AnyTensor]


@dataclass(frozen=True)
class TensorChange:
    """How a tensor changed.

    Attributes:
        old_norm: Frobenius norm of the old tensor.
        difference_norm: Frobenius norm of new - old.
        greatest: largest absolute difference of an element.
    """

    name: str
    shape: tuple[int, ...]
    old_norm: float
    difference_norm: float
    greatest: float

    @property
    def relative(self) -> float:
        """Norm of the difference divided by that of the old tensor."""
        return self.difference_norm / self.old_norm if self.old_norm else float("inf")


@dataclass(frozen=True)
class ModelDiff:
    """The comparison of two models.

    Attributes:
        changes: the tensors that differ, the largest relative change first.
        equal: number of tensors that are equal bit for bit.
        incomparable: sentences about tensors that only one model has, or with different shapes.
    """

    changes: list[TensorChange]
    equal: int
    incomparable: list[str]

    @property
    def relative(self) -> float:
        """Relative change of all tensors that changed, as one vector."""
        old = sum(change.old_norm**2 for change in self.changes)
        difference = sum(change.difference_norm**2 for change in self.changes)
        return sqrt(difference / old) if old else 0.0

    @property
    def changed_elements(self) -> int:
        """Number of elements of the tensors that changed."""
        return sum(prod(change.shape) for change in self.changes)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        changes = [
            {
                "name": change.name,
                "shape": list(change.shape),
                "old_norm": change.old_norm,
                "difference_norm": change.difference_norm,
                "relative": change.relative if change.old_norm else None,
                "greatest": change.greatest,
            }
            for change in self.changes
        ]
        return {"changes": changes, "equal": self.equal, "incomparable": self.incomparable}


def diff_models(old: Path, new: Path) -> ModelDiff:
    """Compare two models, or two adapters.

    Raises:
        UserError: there are no weights, or a file is not a complete safetensors file.
    """
    old_tensors, new_tensors = model_tensors(old), model_tensors(new)
    _add_tied_head(old, old_tensors, new_tensors)
    _add_tied_head(new, new_tensors, old_tensors)
    only_old = old_tensors.keys() - new_tensors.keys()
    only_new = new_tensors.keys() - old_tensors.keys()
    entries = _shared_entries(old, new, only_old, only_new)
    incomparable = [f"{name}: only in {old}" for name in sorted(only_old)]
    incomparable += [f"{name}: only in {new}" for name in sorted(only_new)]
    pairs: list[tuple[str, AnyTensor, AnyTensor]]
    pairs = [(n, old_tensors[n], new_tensors[n]) for n in old_tensors if n in new_tensors]
    changes, equal = [], 0
    count = len(pairs) + len(entries)
    opened = ((name, open_old(), open_new()) for name, (open_old, open_new) in entries.items())
    with progress(f"comparing {count} tensors", count) as bar:
        for name, old_tensor, new_tensor in chain(pairs, opened):
            bar.advance()
            result = _compare(name, old_tensor, new_tensor)
            if isinstance(result, TensorChange):
                changes.append(result)
            elif result:
                incomparable.append(result)
            else:
                equal += 1
    changes.sort(key=lambda change: (-change.relative, change.name))
    return ModelDiff(changes, equal, incomparable)


def _shared_entries(
    old: Path, new: Path, only_old: set[str], only_new: set[str]
) -> dict[str, tuple[Open, Open]]:
    """The entries that both models have, of tensors that go by other names in the other's files.

    The names of these tensors leave the two sets.
    """
    if not only_old or not only_new:
        return {}
    old_entries, new_entries = _entries(old, only_old), _entries(new, only_new)
    shared = old_entries.keys() & new_entries.keys()
    for only, entries in ((only_old, old_entries), (only_new, new_entries)):
        rest = {name for entry in entries.keys() - shared for name in entries[entry][0]}
        only.difference_update({n for entry in shared for n in entries[entry][0]} - rest)
    return {entry: (old_entries[entry][1], new_entries[entry][1]) for entry in sorted(shared)}


def _entries(folder: Path, names: set[str]) -> dict[str, tuple[list[str], Open]]:
    """What these tensors make in the model: names in the files and a function that opens it."""
    if (folder / WEIGHTS).is_file() or not (folder / "config.json").is_file():
        return {}
    base, entries = BaseTensors(folder), dict[str, tuple[list[str], Open]]()
    for entry, source in base.entries.items():
        if isinstance(source, str):
            if source in names:
                entries[entry] = [source], partial(base.files.__getitem__, source)
        elif names.issuperset(source.names) and _fits(source, base.files):
            parts = base.expert_parts.get(entry, [])
            opened = partial(ConvertedTensor, entry, source, parts, base.files)
            entries[entry] = source.names, opened
    return entries


def _fits(conversion: Any, files: ModelTensors) -> bool:
    try:
        conversion.check_shapes({name: files[name].shape for name in conversion.names})
    except UserError:
        return False
    return all(files[name].dtype in FLOAT_DTYPES for name in conversion.names)


def _add_tied_head(
    folder: Path, tensors: dict[str, FileTensor], other_tensors: dict[str, FileTensor]
) -> None:
    """Add a tied model's output head under its own name, if the other model stores one."""
    if all(name in tensors for name in other_tensors) or (folder / WEIGHTS).is_file():
        return
    pair = BaseTensors(folder).tied if (folder / "config.json").is_file() else None
    if pair is not None and pair.missing in other_tensors:
        tensors[pair.missing] = tensors[pair.stored]


def _compare(name: str, old: AnyTensor, new: AnyTensor) -> TensorChange | str | None:
    """Return the change; a sentence if it is not a number; None if there is none."""
    if old.shape != new.shape:
        return f"{name}: {list(old.shape)} and {list(new.shape)}"
    if old.dtype not in FLOAT_DTYPES or new.dtype not in FLOAT_DTYPES:
        if old.dtype == new.dtype and _same_bytes(old, new):
            return None
        return f"{name}: not equal, and not floats ({old.dtype}, {new.dtype})"
    squares, old_squares, greatest = 0.0, 0.0, 0.0
    for a, b in zip(_blocks(old), _blocks(new), strict=True):
        difference = b - a
        squares += float(difference.square().sum())
        old_squares += float(a.square().sum())
        greatest = max(greatest, float(difference.abs().max()))
    if not isfinite(squares):
        return f"{name}: contains NaN or infinity"
    if not squares and old.dtype == new.dtype:
        return None
    return TensorChange(name, old.shape, sqrt(old_squares), sqrt(squares), greatest)


def _same_bytes(old: AnyTensor, new: AnyTensor) -> bool:
    if isinstance(old, ConvertedTensor) or isinstance(new, ConvertedTensor):
        return False  # these are floats
    pairs = zip(old.raw(RAW_BYTES), new.raw(RAW_BYTES), strict=False)
    return all(a == b for a, b in pairs)


def _blocks(tensor: AnyTensor) -> Iterator[Tensor]:
    """Yield blocks of rows in float64, of the same rows whatever the dtype."""
    for rows in row_blocks(tensor.shape or (1,)):
        yield tensor.rows(*rows).double()
