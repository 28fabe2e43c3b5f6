"""Reading a checkpoint, by any ranges."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoints.manifest import Manifest, SavedKind, read_manifest, step_of
from dtrain.checkpoints.parameter_shards import NEUTRAL_KINDS, ParameterShard
from dtrain.checkpoints.shard_file import ShardReader, tensor_key
from dtrain.core.errors import UserError
from dtrain.core.hardware import available_cores
from dtrain.core.hashes import file_hash
from dtrain.core.log import progress
from dtrain.core.ownership import Untrusted, check_own_file, check_own_folder
from dtrain.core.stage_dir import CHECKPOINT_MANIFEST
from dtrain.distributed.tensor_utils import all_finite

MAX_NAMES = 8  # of each group in a message


class Checkpoint:
    """A complete checkpoint; open() checks everything except the shards' content, verify() that."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._manifest = manifest
        self._shards = ShardReader(folder)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a checkpoint's folder.

        Raises:
            Untrusted: foreign owner, writable by anyone, a file that the manifest does not list
                (such as a pickle), a manifest of another format. A person has to decide.
            UserError: no manifest, or one that was changed; a file missing or cut short.
        """
        check_own_folder(folder)
        manifest = read_manifest(check_own_file(folder / CHECKPOINT_MANIFEST))
        if step_of(folder) not in (None, manifest.step):
            raise UserError(f"contains step {manifest.step}", where=str(folder))
        for extra in sorted(set(os.listdir(folder)) - set(manifest.files) - {CHECKPOINT_MANIFEST}):
            raise Untrusted(
                "this file is not listed in the checkpoint's manifest, and is not read",
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
        """The state that the run saved with it."""
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
        """Bytes of all files."""
        manifest_bytes = (self.folder / CHECKPOINT_MANIFEST).stat().st_size
        return manifest_bytes + sum(file.bytes for file in self._manifest.files.values())

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            UserError: a file was changed after it was saved.
        """
        files = self._manifest.files
        workers = max(1, min(len(files), available_cores()))
        title = f"verifying {self.folder.name}"
        with ThreadPoolExecutor(workers) as pool, progress(title, len(files)) as meter:
            hashes = {pool.submit(file_hash, self.folder / name): name for name in files}
            for done in as_completed(hashes):
                path = self.folder / hashes[done]
                if _result(done, path) != files[hashes[done]].blake3:
                    raise UserError(
                        "was changed after it was saved: its hash differs", where=str(path)
                    )
                meter.advance()

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened parameter: float32 [stop - start].

        An opaque kind is returned as it was saved (any dtype and length), for the saved range only.

        Raises:
            UserError: there is no such range, or it contains NaN or infinity.
        """
        with closing(self._shards):
            if kind not in NEUTRAL_KINDS:
                return self._read_opaque(name, kind, start, stop)
            result = torch.empty(stop - start)
            self._copy(name, kind, start, stop, result)
            return result

    def restore(self, shards: Iterable[ParameterShard]) -> None:
        """Copy into the tensors of parameter shards, in place.

        The shards must name every parameter of the checkpoint and no other, with the same shapes
        and kinds; their ranges are free.

        Raises:
            UserError: they do not (nothing has been copied then), or a value is not finite.
        """
        shards = list(shards)
        if problems := self._mismatches(shards):
            raise UserError(
                "does not fit the model: " + "; ".join(problems),
                where=str(self.folder),
                fix="resume with the model and method it was saved from, or start with --fresh",
            )
        title = f"reading {self.folder.name}"
        with closing(self._shards), torch.no_grad(), progress(title, len(shards)) as meter:
            for shard in shards:
                self._restore(shard)
                meter.advance()

    def _restore(self, shard: ParameterShard) -> None:
        for kind, target in shard.tensors.items():
            if shard.start == shard.stop:
                continue
            if kind in NEUTRAL_KINDS:
                self._copy(shard.name, kind, shard.start, shard.stop, target)
            else:
                self._copy_opaque(shard, kind, target)

    def _copy(self, name: str, kind: str, start: int, stop: int, target: Tensor) -> None:
        """Fill `target` [stop - start] from whatever slices cover the range."""
        for at, block in self._blocks(name, kind, start, stop):
            self._check_finite(block, name, kind, at)
            target[at - start : at - start + block.numel()].copy_(block)

    def _blocks(self, name: str, kind: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        entry = self._kind(name, kind)
        reached = start
        for first, last, file in entry.slices:
            low, high = max(first, start), min(last, stop)
            if low < high:
                key = tensor_key(name, kind, first)
                for at, block in self._shards.read(file, key, low - first, high - first):
                    yield first + at, block
                reached = high
        if reached != stop:
            raise UserError(f"{name} {kind} has no elements up to {stop}", where=str(self.folder))

    def _read_opaque(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        for first, last, file in self._kind(name, kind).slices:
            if (first, last) == (start, stop):
                saved = self._shards.read_all(file, tensor_key(name, kind, first))
                self._check_finite(saved, name, kind, start)
                return saved
        raise UserError(
            f"{name} {kind} was not saved for elements {start} to {stop}: "
            "this optimizer's state cannot be resharded",
            where=str(self.folder),
            fix="resume with the same engine and number of ranks, or train.optimizer: adamw",
        )

    def _copy_opaque(self, shard: ParameterShard, kind: str, target: Tensor) -> None:
        saved = self._read_opaque(shard.name, kind, shard.start, shard.stop)
        if saved.shape != target.shape or saved.dtype != target.dtype:
            raise UserError(
                f"{shard.name} {kind}: saved as {saved.dtype} [{saved.numel()}], "
                f"this optimizer has {target.dtype} [{target.numel()}]",
                where=str(self.folder),
                fix="resume with the same train.optimizer",
            )
        target.copy_(saved)

    def _kind(self, name: str, kind: str) -> SavedKind:
        parameter = self._manifest.parameters.get(name)
        if parameter is None or kind not in parameter.kinds:
            raise UserError(f"has no {name} {kind}", where=str(self.folder))
        return parameter.kinds[kind]

    def _check_finite(self, block: Tensor, name: str, kind: str, at: int) -> None:
        if not all_finite(block):
            raise UserError(
                f"{name} {kind} contains NaN or infinity (from element {at})",
                where=str(self.folder),
            )

    def _mismatches(self, shards: list[ParameterShard]) -> list[str]:
        saved, now = self.names, {shard.name: shard.shape for shard in shards}
        both = [name for name in now if name in saved]
        kinds = self.kinds
        problems = {
            "missing in the checkpoint": [name for name in now if name not in saved],
            "not in the model": [name for name in saved if name not in now],
            "with another shape": [
                f"{name} {list(saved[name])} (model {list(now[name])})"
                for name in both
                if saved[name] != tuple(now[name])
            ],
            "saved with other state": [
                f"{p.name} {sorted(kinds[p.name])} (optimizer {sorted(p.tensors)})"
                for p in shards
                if p.start < p.stop and p.name in saved and kinds[p.name] != frozenset(p.tensors)
            ],
        }
        return [f"{len(n)} {title}: {_join_names(n)}" for title, n in problems.items() if n]


def _join_names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _result(done: Any, path: Path) -> str:
    try:
        return str(done.result())
    except OSError as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error
