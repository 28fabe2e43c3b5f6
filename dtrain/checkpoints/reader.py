"""Reading a checkpoint, by whatever ranges are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoints.file_names import step_of
from dtrain.checkpoints.manifest import MANIFEST, Kind, Manifest, parse
from dtrain.checkpoints.parameter_shards import NEUTRAL_KINDS, ParameterShard, is_finite
from dtrain.checkpoints.shard_file import ShardReader, tensor_key
from dtrain.core.errors import UserError
from dtrain.core.hashes import file_hash
from dtrain.core.log import progress
from dtrain.core.ownership import Untrusted, check_own_file, check_own_folder

SHOWN = 8  # keys of each sort in a message


class Checkpoint:
    """A complete checkpoint; open() checks everything but the shards' content, verify() that."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._manifest = manifest
        self._shards = ShardReader(folder)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a checkpoint's folder.

        Raises:
            Untrusted: foreign owner, writable by anyone, a file that the manifest does not list
                (a pickle, say), a manifest of another version. A person has to look.
            UserError: no manifest, or one that was changed; a file missing or cut short.
        """
        check_own_folder(folder)
        manifest = parse(check_own_file(folder / MANIFEST))
        if step_of(folder) not in (None, manifest.step):
            raise UserError(f"holds step {manifest.step}", where=str(folder))
        for extra in sorted(set(os.listdir(folder)) - set(manifest.files) - {MANIFEST}):
            raise Untrusted(
                "this file is not part of the checkpoint, and will not be read",
                where=str(folder / extra),
                fix="find out who put it there, then remove it",
            )
        for name, file in manifest.files.items():
            size = check_own_file(folder / name).stat().st_size
            if size != file.bytes:
                raise UserError(
                    f"has {size} bytes instead of {file.bytes}", where=str(folder / name)
                )
        return cls(folder, manifest)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """What the saving run gave along."""
        return self._manifest.state

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Parameter → its global shape."""
        return {name: tuple(p.shape) for name, p in self._manifest.parameters.items()}

    @property
    def kinds(self) -> dict[str, frozenset[str]]:
        """Parameter → what was saved of it (weight, exp_avg, ...)."""
        return {name: frozenset(p.kinds) for name, p in self._manifest.parameters.items()}

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        own = (self.folder / MANIFEST).stat().st_size
        return own + sum(file.bytes for file in self._manifest.files.values())

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            UserError: a file is not what was written; it is named.
        """
        files = self._manifest.files
        workers = max(1, min(len(files), os.cpu_count() or 1))
        title = f"verifying {self.folder.name}"
        with ThreadPoolExecutor(workers) as pool, progress(title, len(files)) as meter:
            hashes = {pool.submit(file_hash, self.folder / name): name for name in files}
            for done in as_completed(hashes):
                path = self.folder / hashes[done]
                if _result(done, path) != files[hashes[done]].blake3:
                    raise UserError("its hash is not the one that was saved", where=str(path))
                meter.advance()

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter: float32 [stop - start].

        An opaque kind is given as it was saved (any dtype and length), for the saved range only.

        Raises:
            UserError: there is no such range, or it holds NaN or infinity.
        """
        with closing(self._shards):
            if kind not in NEUTRAL_KINDS:
                return self._read_opaque(name, kind, start, stop)
            result = torch.empty(stop - start)
            self._copy(name, kind, start, stop, result)
            return result

    def restore(self, pieces: Iterable[ParameterShard]) -> None:
        """Copy into the pieces' tensors, in place.

        The pieces have to name every parameter of the checkpoint and no other, with the same
        shapes and kinds; ranges may be any.

        Raises:
            UserError: they do not (nothing has been copied then), or a value is not finite.
        """
        wanted = list(pieces)
        if problems := self._misfits(wanted):
            raise UserError(
                "it does not fit the model: " + "; ".join(problems),
                where=str(self.folder),
                fix="resume with the model and method it was saved from, or start with --fresh",
            )
        title = f"reading {self.folder.name}"
        with closing(self._shards), torch.no_grad(), progress(title, len(wanted)) as meter:
            for piece in wanted:
                self._restore(piece)
                meter.advance()

    def _restore(self, piece: ParameterShard) -> None:
        for kind, target in piece.tensors.items():
            if piece.start == piece.stop:
                continue
            if kind in NEUTRAL_KINDS:
                self._copy(piece.name, kind, piece.start, piece.stop, target)
            else:
                self._copy_opaque(piece, kind, target)

    def _copy(self, name: str, kind: str, start: int, stop: int, target: Tensor) -> None:
        """Fill `target` [stop - start] from whatever slices cover the range."""
        for at, part in self._parts(name, kind, start, stop):
            self._refuse_non_finite(part, name, kind, at)
            target[at - start : at - start + part.numel()].copy_(part)

    def _parts(self, name: str, kind: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        entry = self._kind(name, kind)
        reached = start
        for first, last, file in entry.slices:
            low, high = max(first, start), min(last, stop)
            if low < high:
                key = tensor_key(name, kind, first)
                for at, part in self._shards.parts(file, key, low - first, high - first):
                    yield first + at, part
                reached = high
        if reached != stop:
            raise UserError(f"{name} {kind} has no elements to {stop}", where=str(self.folder))

    def _read_opaque(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        for first, last, file in self._kind(name, kind).slices:
            if (first, last) == (start, stop):
                saved = self._shards.whole(file, tensor_key(name, kind, first))
                self._refuse_non_finite(saved, name, kind, start)
                return saved
        raise UserError(
            f"{name} {kind} was not saved for elements {start} to {stop}: "
            "this optimizer's state cannot be cut anew",
            where=str(self.folder),
            fix="resume with the same engine and number of ranks, or train.optimizer: adamw",
        )

    def _copy_opaque(self, piece: ParameterShard, kind: str, target: Tensor) -> None:
        saved = self._read_opaque(piece.name, kind, piece.start, piece.stop)
        if saved.shape != target.shape or saved.dtype != target.dtype:
            raise UserError(
                f"{piece.name} {kind}: saved as {saved.dtype} [{saved.numel()}], "
                f"this optimizer has {target.dtype} [{target.numel()}]",
                where=str(self.folder),
                fix="resume with the same train.optimizer",
            )
        target.copy_(saved)

    def _kind(self, name: str, kind: str) -> Kind:
        parameter = self._manifest.parameters.get(name)
        if parameter is None or kind not in parameter.kinds:
            raise UserError(f"{name} {kind} is not in it", where=str(self.folder))
        return parameter.kinds[kind]

    def _refuse_non_finite(self, part: Tensor, name: str, kind: str, at: int) -> None:
        if not is_finite(part):
            raise UserError(
                f"{name} {kind} holds NaN or infinity (from element {at})", where=str(self.folder)
            )

    def _misfits(self, wanted: list[ParameterShard]) -> list[str]:
        saved, now = self.names, {piece.name: piece.shape for piece in wanted}
        both = [name for name in now if name in saved]
        kinds = self.kinds
        found = {
            "missing in the checkpoint": [name for name in now if name not in saved],
            "not in the model": [name for name in saved if name not in now],
            "of another shape": [
                f"{name} {list(saved[name])} (model {list(now[name])})"
                for name in both
                if saved[name] != tuple(now[name])
            ],
            "saved with other kinds": [
                f"{p.name} {sorted(kinds[p.name])} (optimizer {sorted(p.tensors)})"
                for p in wanted
                if p.start < p.stop and p.name in saved and kinds[p.name] != frozenset(p.tensors)
            ],
        }
        return [f"{len(n)} {title}: {_shortened(n)}" for title, n in found.items() if n]


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _result(done: Any, path: Path) -> str:
    try:
        return str(done.result())
    except OSError as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error
