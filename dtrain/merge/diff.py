"""Which tensors of two models differ, and by how much, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.core.log import progress
from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.verify import RAW_BYTES, model_tensors
from dtrain.models.peft_format import WEIGHTS
from dtrain.models.stored_tensors import FLOAT_DTYPES, DecodedTensor, StoredTensor, row_blocks

AnyTensor = StoredTensor | DecodedTensor


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
    incomparable = [f"{n}: only in {old}" for n in sorted(old_tensors.keys() - new_tensors.keys())]
    incomparable += [f"{n}: only in {new}" for n in sorted(new_tensors.keys() - old_tensors.keys())]
    shared = [name for name in old_tensors if name in new_tensors]
    changes, equal = [], 0
    with progress(f"comparing {len(shared)} tensors", len(shared)) as bar:
        for name in shared:
            bar.advance()
            result = _compare(name, old_tensors[name], new_tensors[name])
            if isinstance(result, TensorChange):
                changes.append(result)
            elif result:
                incomparable.append(result)
            else:
                equal += 1
    changes.sort(key=lambda change: (-change.relative, change.name))
    return ModelDiff(changes, equal, incomparable)


def _add_tied_head(
    folder: Path, tensors: dict[str, AnyTensor], other_tensors: dict[str, AnyTensor]
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
        pairs = zip(old.raw(RAW_BYTES), new.raw(RAW_BYTES), strict=False)
        if old.dtype == new.dtype and all(a == b for a, b in pairs):
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


def _blocks(tensor: AnyTensor) -> Iterator[Tensor]:
    """Yield blocks of rows in float64, of the same rows whatever the dtype."""
    for rows in row_blocks(tensor.shape or (1,)):
        yield tensor.rows(*rows).double()
