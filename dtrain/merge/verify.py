"""Models looked at in one reading, a block at a time: are they whole, and what changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.files import read_json
from dtrain.core.hashes import file_hash
from dtrain.core.log import progress
from dtrain.core.run_dir import MERGE_MANIFEST
from dtrain.merge.adapter import WEIGHTS
from dtrain.merge.merge import FORMAT
from dtrain.merge.stream import BLOCK_ELEMENTS
from dtrain.merge.tied_weights import FLOATS, Shapes, StoredTensor, stored_tensors
from dtrain.models.tensor_utils import all_finite
from dtrain.models.weight_files import INDEX, read_header, weight_files

COMPARED = FLOATS | {"F64": torch.float64}
COPIED_BYTES = 1 << 22  # of a tensor whose values are not looked at


@dataclass
class Verified:
    """What a model's files are.

    Attributes:
        hashed: files whose hash stands in the manifest.
        problems: sentences, each with the file or tensor it is about.
    """

    tensors: int = 0
    bytes: int = 0
    hashed: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """What became of a tensor: the norms of the old one and of the difference, both Frobenius."""

    name: str
    shape: tuple[int, ...]
    old: float
    difference: float
    greatest: float

    @property
    def relative(self) -> float:
        """Norm of the difference over that of the old tensor."""
        return self.difference / self.old if self.old else float("inf")


@dataclass(frozen=True)
class Compared:
    """Two models side by side.

    Attributes:
        changes: the tensors that differ, the greatest relative change first.
        same: how many are equal to the bit.
        unlike: names that one of them has not, or in another shape, with a word on it.
    """

    changes: list[Change]
    same: int
    unlike: list[str]


def verify(folder: Path) -> Verified:
    """Hash every file that the manifest names, and look at every value, in one reading.

    A folder without merge.json (a base as it came, an adapter) is looked at for its values alone.

    Raises:
        UserError: there are no weights, or a file is no whole safetensors file.
    """
    found, manifest = Verified(), folder / MERGE_MANIFEST
    listed = _listed(manifest) if manifest.is_file() else {}
    weights = _weights(folder)
    with progress(f"verifying {folder.name}", len(weights)) as bar:
        for path in weights:
            _verify_weights(path, listed.pop(path.name, None), found)
            bar.advance()
    _check_index(folder, found)
    for name, digest in listed.items():
        if not (folder / name).is_file():
            found.problems.append(f"{name}: is missing")
        elif file_hash(folder / name) != digest:
            found.problems.append(f"{name}: is not what was written")
        found.hashed += 1
    return found


def diff(old: Path, new: Path) -> Compared:
    """Which tensors of two models differ, and by how much.

    Raises:
        UserError: there are no weights, or a file is no whole safetensors file.
    """
    ours, theirs = _tensors(old), _tensors(new)
    _add_tied(old, ours, theirs)
    _add_tied(new, theirs, ours)
    unlike = [f"{name}: only in {old}" for name in sorted(ours.keys() - theirs.keys())]
    unlike += [f"{name}: only in {new}" for name in sorted(theirs.keys() - ours.keys())]
    shared = [name for name in ours if name in theirs]
    changes, same = [], 0
    with progress(f"comparing {len(shared)} tensors", len(shared)) as bar:
        for name in shared:
            bar.advance()
            if ours[name].shape != theirs[name].shape:
                shapes = f"{list(ours[name].shape)} and {list(theirs[name].shape)}"
                unlike.append(f"{name}: {shapes}")
            elif isinstance(change := _compare(name, ours[name], theirs[name]), Change):
                changes.append(change)
            elif change:
                unlike.append(change)
            else:
                same += 1
    changes.sort(key=lambda change: (-change.relative, change.name))
    return Compared(changes, same, unlike)


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    return {n: t for path in _weights(folder) for n, t in stored_tensors(path).items()}


def _add_tied(folder: Path, ours: dict[str, StoredTensor], theirs: dict[str, StoredTensor]) -> None:
    """The head of a tied model by its own name, where the other model has one of its own."""
    if all(name in ours for name in theirs) or (folder / WEIGHTS).is_file():
        return
    pair = Shapes(folder).tied if (folder / "config.json").is_file() else None
    if pair is not None and pair.missing in theirs:
        ours[pair.missing] = ours[pair.stored]


def _weights(folder: Path) -> list[Path]:
    """A model's weight files, or an adapter's."""
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else weight_files(folder)


def _compare(name: str, old: StoredTensor, new: StoredTensor) -> Change | str | None:
    """What changed; a word if it cannot be said in numbers; None if nothing did."""
    if old.dtype not in COMPARED or new.dtype not in COMPARED:
        pairs = zip(old.raw(COPIED_BYTES), new.raw(COPIED_BYTES), strict=False)
        if old.dtype == new.dtype and all(a == b for a, b in pairs):
            return None
        return f"{name}: not floats ({old.dtype}, {new.dtype}), and not equal"
    squares, before, greatest = 0.0, 0.0, 0.0
    for a, b in zip(_doubles(old), _doubles(new), strict=True):
        gap = b - a
        squares += float(gap.square().sum())
        before += float(a.square().sum())
        greatest = max(greatest, float(gap.abs().max()))
    if not isfinite(squares):
        return f"{name}: holds NaN or infinity"
    if not squares and old.dtype == new.dtype:
        return None
    return Change(name, old.shape, sqrt(before), sqrt(squares), greatest)


def _doubles(place: StoredTensor) -> Iterator[Tensor]:
    """The blocks in float64, of one number of elements whatever the dtype."""
    dtype = COMPARED[place.dtype]
    for data in place.raw(BLOCK_ELEMENTS * dtype.itemsize):
        yield torch.frombuffer(data, dtype=dtype).double()


def _verify_weights(path: Path, digest: str | None, found: Verified) -> None:
    hashed = blake3(read_header(path)[1])
    for name, tensor in stored_tensors(path).items():
        finite, dtype = True, COMPARED.get(tensor.dtype)
        for data in tensor.raw(BLOCK_ELEMENTS * dtype.itemsize if dtype else COPIED_BYTES):
            hashed.update(data)
            if dtype:
                finite &= all_finite(torch.frombuffer(data, dtype=dtype))
        if not finite:
            found.problems.append(f"{path.name}: {name} holds NaN or infinity")
        found.tensors += 1
    found.bytes += path.stat().st_size
    if digest is not None:
        found.hashed += 1
        if hashed.hexdigest() != digest:
            found.problems.append(f"{path.name}: is not what was written")


def _check_index(folder: Path, found: Verified) -> None:
    """The index names every tensor, in the file where it lies."""
    index = folder / INDEX
    if not index.is_file() or (folder / WEIGHTS).is_file():
        return
    named = dict(read_json(index)["weight_map"])
    lies = {name: place.path.name for name, place in _tensors(folder).items()}
    for name in sorted(named.keys() | lies.keys()):
        if named.get(name) != lies.get(name):
            where = f"the index says {named.get(name)}, it lies in {lies.get(name)}"
            found.problems.append(f"{name}: {where}")


def _listed(manifest: Path) -> dict[str, str]:
    try:
        content = read_json(manifest)
        if content.get("format") != FORMAT:
            fix = "merge again; files of another format cannot be compared"
            what = f"has format {content.get('format', 'of an older dtrain')}, expected {FORMAT}"
            raise UserError(what, where=str(manifest), fix=fix)
        files = content["files"]
        return {str(name): str(digest) for name, digest in files.items() if Path(name).name == name}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError("names no files", where=str(manifest)) from error


def as_json(found: Compared) -> dict[str, Any]:
    """For a file."""
    changes = [
        {
            "name": change.name,
            "shape": list(change.shape),
            "old_norm": change.old,
            "difference_norm": change.difference,
            "relative": change.relative if change.old else None,
            "greatest": change.greatest,
        }
        for change in found.changes
    ]
    return {"changes": changes, "same": found.same, "unlike": found.unlike}


def overall(found: Compared) -> float:
    """Relative change of all tensors that changed, as one vector."""
    before = sum(change.old**2 for change in found.changes)
    gap = sum(change.difference**2 for change in found.changes)
    return sqrt(gap / before) if before else 0.0


def elements(found: Compared) -> int:
    """Of the tensors that changed."""
    return sum(prod(change.shape) for change in found.changes)
