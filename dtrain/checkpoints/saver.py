"""Saving: copy to host memory at once, then write, hash, fsync and publish in the background.

Each rank writes its own file and a record of it into one temporary folder. Rank 0 waits for all
records by looking at the file system (a collective in a thread could meet one of the training's),
checks that the ranges cover every parameter, writes the manifest, and renames the folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrain.checkpoints.file_names import (
    REMOVED_PREFIX,
    failed_name,
    record_name,
    shard_name,
    step_name,
    work_name,
)
from dtrain.checkpoints.folder import remove
from dtrain.checkpoints.host_shards import HostShard
from dtrain.checkpoints.manifest import (
    MANIFEST,
    PARAMETERS,
    File,
    Kind,
    Manifest,
    Parameter,
    Record,
    merge_records,
)
from dtrain.checkpoints.parameter_shards import ParameterShard
from dtrain.checkpoints.shard_file import DTYPES, tensor_key
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import fsync_folder

PATIENCE_SECONDS = 600.0
NICE = 5  # the training comes first, but must not wait for a save that never gets a core


class _Held(NamedTuple):
    """What this rank holds of one parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    kinds: tuple[tuple[str, str], ...]  # kind and dtype


@lru_cache(maxsize=1)  # from save to save nothing of it changes
def _told(held: tuple[_Held, ...], file: str) -> str:
    """What a rank holds, as its record tells it."""
    parameters = {
        one.name: Parameter(
            shape=list(one.shape),
            kinds={
                kind: Kind(dtype=dtype, slices=[(one.start, one.stop, file)])
                for kind, dtype in one.kinds
            },
        )
        for one in held
    }
    return PARAMETERS.dump_json(parameters).decode()


@dataclass(frozen=True)
class _Job:
    """One save of this rank, frozen at the moment of the call."""

    step: int
    work: Path
    target: Path
    state: dict[str, Any]
    held: tuple[_Held, ...]


class Saver:
    """Saves one stage's checkpoints; every rank has one, and calls it at the same steps.

    Args:
        folder: where the stage's checkpoints lie, on a file system that all ranks see.
        rank: of this process.
        ranks: how many write.
        attempt: an id that rank 0 drew and gave to all, new at each start of the workers.
        published: called by rank 0, in the background, after a checkpoint has become complete
            (to remove older ones).
        patience_seconds: rank 0 gives up when no rank has written a byte for so long.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        ranks: int,
        attempt: str,
        published: Callable[[Path], object] | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9]+", attempt):
            raise ValueError(f"attempt {attempt!r}: letters and digits expected")
        self._folder, self._rank, self._ranks, self._attempt = folder, rank, ranks, attempt
        self._published, self._patience = published, patience_seconds
        self.seconds = 0.0  # of the last save, from its call to the disk
        self._calls = 0
        self._host = HostShard({})
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, pieces: Iterable[ParameterShard], state: dict[str, Any]) -> None:
        """Save this rank's pieces; returns once they are copied to host memory.

        Waits for the save before. A piece may be dropped as soon as the next is asked for, so a
        generator may gather them one by one.

        Args:
            step: optimizer steps done.
            pieces: all of this rank; what several ranks hold alike is given by one of them.
            state: plain values for JSON; rank 0's is kept. `held_out_loss` decides which is best.

        Raises:
            UserError, RuntimeError: the save *before* failed; nothing of this one is written.
            ValueError, TypeError: `state` holds what JSON cannot (NaN among it).
        """
        self._calls += 1  # before anything can fail: the folder's name must be one on all ranks
        self.wait()
        frozen = json.loads(json.dumps(state, allow_nan=False))
        held = self._copy(pieces)
        work = self._folder / work_name(step, f"{self._attempt}x{self._calls}")
        job = _Job(step, work, self._folder / step_name(step), frozen, held)
        # A daemon, so that a crash of the training does not wait for ranks that will never write.
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until this rank's part of the last save is on disk; on rank 0, until it is complete.

        Raises:
            UserError: the disk is full, a tensor is not finite, a rank did not write.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, pieces: Iterable[ParameterShard]) -> tuple[_Held, ...]:
        """Copy all tensors into this rank's shard; tell what it holds."""
        held: dict[str, _Held] = {}
        taken: dict[str, Tensor] = {}
        for piece in pieces:
            if piece.name in held:
                raise ValueError(f"{piece.name}: two pieces on one rank")
            tensors = piece.tensors if piece.start < piece.stop else {}
            kinds = tuple((kind, DTYPES[tensor.dtype]) for kind, tensor in tensors.items())
            held[piece.name] = _Held(piece.name, piece.shape, piece.start, piece.stop, kinds)
            for kind, tensor in tensors.items():
                key = tensor_key(piece.name, kind, piece.start)
                taken[key] = self._host.take(key, tensor.detach())
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if not self._host.is_made_of(taken):
            self._host = HostShard(taken, pinned=torch.cuda.is_initialized())
        return tuple(held.values())

    def _run(self, job: _Job) -> None:
        started = time.monotonic()
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.nice(NICE)  # of this thread alone
        try:
            self._write(job)
            if self._rank == 0:
                publish(job.work, job.target, self._ranks, self._patience, job.step, job.state)
                if self._published is not None:
                    self._published(job.target)
            self.seconds = time.monotonic() - started
        except BaseException as error:
            self._error = _explained(error, job)
            self._give_up(job)

    def _write(self, job: _Job) -> None:
        """Write this rank's shard and, once it is on disk, its record."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        job.work.mkdir(exist_ok=True, mode=0o700)
        name, files = shard_name(self._rank), {}
        if any(held.kinds for held in job.held):
            size, digest = self._host.write(job.work / name)
            files[name] = File(bytes=size, blake3=digest)
        record = Record(rank=self._rank, files=files, held=_told(job.held, name))
        write_new(job.work / record_name(self._rank), record.model_dump_json())

    def _give_up(self, job: _Job) -> None:
        """Leave nothing half written, and tell rank 0, which would wait in vain."""
        if self._rank == 0:
            # Moved first: a rank that is still writing would put a file into what is being removed.
            with suppress(OSError):
                remove(job.work)
            return
        with suppress(OSError):
            (job.work / shard_name(self._rank)).unlink(missing_ok=True)
            write_new(job.work / failed_name(self._rank), str(self._error))


def _explained(error: BaseException, job: _Job) -> BaseException:
    """An error of the file system in the user's words; any other as it is."""
    if not isinstance(error, OSError):
        return error
    fix = "make room, or keep fewer checkpoints (output.keep_checkpoints)"
    if isinstance(error, FileNotFoundError):
        fix = "see rank 0's message: it gave this checkpoint up"
    explained = UserError(
        f"the checkpoint of step {job.step} cannot be written: {error.strerror or error}; "
        "the earlier ones are intact",
        where=str(job.target),
        fix=fix,
    )
    explained.__cause__ = error
    return explained


POLL_SECONDS = 0.02


def publish(
    work: Path, target: Path, ranks: int, patience_seconds: float, step: int, state: dict[str, Any]
) -> None:
    """Turn the folder `work`, once all ranks have written into it, into the checkpoint `target`.

    Raises:
        UserError: a rank failed, or wrote nothing for too long.
        RuntimeError: the ranks' pieces leave a hole or an overlap.
        OSError: the file system refuses.
    """
    records = _Records(work, ranks, patience_seconds).wait()
    manifest = merge_records(records, step, state)
    _check_sizes(manifest, work)
    for rank in range(ranks):
        (work / record_name(rank)).unlink()
    write_new(work / MANIFEST, manifest.render())
    fsync_folder(work)
    _put_in_place(work, target)


class _Records:
    """Rank 0's wait for the records of all ranks."""

    def __init__(self, work: Path, ranks: int, patience_seconds: float) -> None:
        self._work, self._patience = work, patience_seconds
        self._missing = set(range(ranks))
        self._found: list[Record] = []

    def wait(self) -> list[Record]:
        """The ranks' records, once all are there.

        Raises:
            UserError: a rank failed, or nobody wrote a byte for too long.
        """
        seen, since = -1, time.monotonic()
        while self._collect():
            if (now := self._bytes()) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > self._patience:
                raise UserError(
                    f"ranks {sorted(self._missing)} did not write their part of the checkpoint",
                    where=str(self._work),
                    fix="look whether they live, and see this folder",
                    status=Exit.HANG,
                )
            time.sleep(POLL_SECONDS)
        return self._found

    def _collect(self) -> bool:
        """Read the records that have come; whether some are still missing."""
        for rank in sorted(self._missing):
            if (note := self._work / failed_name(rank)).exists():
                raise UserError(f"rank {rank} could not save: {note.read_text(encoding='utf-8')}")
            if (path := self._work / record_name(rank)).exists():
                self._found.append(Record.model_validate_json(path.read_bytes()))
                self._missing.remove(rank)
        return bool(self._missing)

    def _bytes(self) -> int:
        total = 0
        for entry in os.scandir(self._work):
            with suppress(FileNotFoundError):  # renamed since it was listed
                total += entry.stat().st_size
        return total


def write_new(path: Path, text: str) -> None:
    """Write a file that appears whole, in a folder that is not made anew if it was given up."""
    temporary = path.with_name(f".{path.name}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _check_sizes(manifest: Manifest, work: Path) -> None:
    for name, file in manifest.files.items():
        if (size := (work / name).stat().st_size) != file.bytes:
            raise UserError(f"{file.bytes} bytes written, {size} found", where=str(work / name))


def _put_in_place(work: Path, target: Path) -> None:
    """Rename; what stood there (found broken at the resume, or saved twice) is moved aside."""
    aside = target.with_name(f"{REMOVED_PREFIX}{work.name.lstrip('.')}")
    if target.exists():
        target.rename(aside)
    work.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
