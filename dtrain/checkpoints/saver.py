"""Saving: copy to host memory at once; then write, hash, fsync and publish in the background.

Each rank writes its own file and a record of it into one temporary folder. Rank 0 waits for all
records by polling the file system (a collective in a thread could collide with one of training),
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

from dtrain.checkpoints.folder import remove
from dtrain.checkpoints.manifest import (
    PARAMETERS,
    REMOVED_PREFIX,
    Manifest,
    RankRecord,
    SavedKind,
    SavedParameter,
    ShardFileInfo,
    failed_name,
    merge_rank_records,
    record_name,
    shard_name,
    step_name,
    work_name,
)
from dtrain.checkpoints.parameter_shards import ParameterShard
from dtrain.checkpoints.shard_file import DTYPES, HostShard, tensor_key
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import fsync_folder
from dtrain.core.ownership import open_in_place
from dtrain.core.stage_dir import CHECKPOINT_MANIFEST

TIMEOUT_SECONDS = 600.0
NICE = 5  # training comes first, but must not wait for a save that never gets a core


class _LocalParameter(NamedTuple):
    """This rank's range of one parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    kinds: tuple[tuple[str, str], ...]  # kind and dtype


@lru_cache(maxsize=1)  # it is the same for every save
def _render_parameters(parameters: tuple[_LocalParameter, ...], file: str) -> str:
    """Return a rank's parameters as JSON for its record."""
    saved = {
        local.name: SavedParameter(
            shape=list(local.shape),
            kinds={
                kind: SavedKind(dtype=dtype, slices=[(local.start, local.stop, file)])
                for kind, dtype in local.kinds
            },
        )
        for local in parameters
    }
    return PARAMETERS.dump_json(saved).decode()


@dataclass(frozen=True)
class _SaveJob:
    """One save of this rank, as of the call."""

    step: int
    work: Path
    target: Path
    state: dict[str, Any]
    parameters: tuple[_LocalParameter, ...]


class Saver:
    """Saves one stage's checkpoints; every rank has one and calls it at the same steps.

    Args:
        folder: of the stage's checkpoints, on a file system that all ranks share.
        rank: of this process.
        ranks: number of ranks that save.
        attempt: an id that all ranks share, new at each start of the workers.
        on_published: called by rank 0, in the background, after a checkpoint is complete (to
            remove older ones).
        timeout_seconds: rank 0 gives up when no rank has written a byte for this long.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        ranks: int,
        attempt: str,
        on_published: Callable[[Path], object] | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9]+", attempt):
            raise ValueError(f"attempt {attempt!r}: letters and digits expected")
        self._folder, self._rank, self._ranks, self._attempt = folder, rank, ranks, attempt
        self._on_published, self._timeout = on_published, timeout_seconds
        self.seconds = 0.0  # of the last save, from its call to the disk
        self._calls = 0
        self._host = HostShard({})
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, shards: Iterable[ParameterShard], state: dict[str, Any]) -> None:
        """Save this rank's parameter shards; return once they are copied to host memory.

        Waits for the previous save first. A shard may be freed as soon as the next is requested, so
        a generator may gather them one by one.

        Args:
            step: optimizer steps done.
            shards: all of this rank; what several ranks hold is given by one of them.
            state: plain values for JSON; rank 0's is saved. `score` decides which is best.

        Raises:
            UserError, RuntimeError: the *previous* save failed; nothing of this one is written.
            ValueError, TypeError: `state` contains what JSON cannot express, such as NaN.
        """
        self._calls += 1  # before anything can fail: all ranks must agree on the folder's name
        self.wait()
        frozen = json.loads(json.dumps(state, allow_nan=False))
        parameters = self._copy(shards)
        work = self._folder / work_name(step, f"{self._attempt}x{self._calls}")
        job = _SaveJob(step, work, self._folder / step_name(step), frozen, parameters)
        # A daemon, so that a crash of training does not wait for ranks that will never write.
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until this rank's file of the last save is on disk; on rank 0, of all ranks.

        Raises:
            UserError: the disk is full, a tensor is not finite, a rank did not write.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, shards: Iterable[ParameterShard]) -> tuple[_LocalParameter, ...]:
        """Copy all tensors into this rank's file in memory; return its parameters."""
        parameters: dict[str, _LocalParameter] = {}
        taken: dict[str, Tensor] = {}
        for shard in shards:
            if shard.name in parameters:
                raise ValueError(f"{shard.name}: two shards on one rank")
            tensors = shard.tensors if shard.start < shard.stop else {}
            kinds = tuple((kind, DTYPES[tensor.dtype]) for kind, tensor in tensors.items())
            parameters[shard.name] = _LocalParameter(
                shard.name, shard.shape, shard.start, shard.stop, kinds
            )
            for kind, tensor in tensors.items():
                key = tensor_key(shard.name, kind, shard.start)
                taken[key] = self._host.take(key, tensor.detach())
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if not self._host.holds_exactly(taken):
            self._host = HostShard(taken, pinned=torch.cuda.is_initialized())
        return tuple(parameters.values())

    def _run(self, job: _SaveJob) -> None:
        started = time.monotonic()
        if sys.platform == "linux":  # elsewhere threads have no priority
            os.nice(NICE)  # of this thread alone
        try:
            self._write(job)
            if self._rank == 0:
                publish(job.work, job.target, self._ranks, self._timeout, job.step, job.state)
                if self._on_published is not None:
                    self._on_published(job.target)
            self.seconds = time.monotonic() - started
        except BaseException as error:
            self._error = _explained(error, job)
            self._give_up(job)

    def _write(self, job: _SaveJob) -> None:
        """Write this rank's shard and, once it is on disk, its record."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        job.work.mkdir(exist_ok=True, mode=0o700)
        name, files = shard_name(self._rank), {}
        if any(local.kinds for local in job.parameters):
            size, digest = self._host.write(job.work / name)
            files[name] = ShardFileInfo(bytes=size, blake3=digest)
        record = RankRecord(
            rank=self._rank, files=files, parameters=_render_parameters(job.parameters, name)
        )
        write_new(job.work / record_name(self._rank), record.model_dump_json())

    def _give_up(self, job: _SaveJob) -> None:
        """Remove what is half written, and report to rank 0, which would wait for nothing."""
        if self._rank == 0:
            # Moved first: a rank that is still writing would put a file into what is being removed.
            with suppress(OSError):
                remove(job.work)
            return
        with suppress(OSError):
            (job.work / shard_name(self._rank)).unlink(missing_ok=True)
            write_new(job.work / failed_name(self._rank), str(self._error))


def _explained(error: BaseException, job: _SaveJob) -> BaseException:
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
    work: Path, target: Path, ranks: int, timeout_seconds: float, step: int, state: dict[str, Any]
) -> None:
    """Turn the folder `work`, once all ranks have written into it, into the checkpoint `target`.

    Raises:
        UserError: a rank failed, or wrote nothing for too long.
        RuntimeError: the ranks' ranges have a gap or an overlap.
        OSError: the file system refuses.
    """
    records = _Records(work, ranks, timeout_seconds).wait()
    manifest = merge_rank_records(records, step, state)
    _check_sizes(manifest, work)
    for rank in range(ranks):
        (work / record_name(rank)).unlink()
    write_new(work / CHECKPOINT_MANIFEST, manifest.render())
    fsync_folder(work)
    _put_in_place(work, target)


class _Records:
    """Rank 0's wait for the records of all ranks."""

    def __init__(self, work: Path, ranks: int, timeout_seconds: float) -> None:
        self._work, self._timeout = work, timeout_seconds
        self._missing = set(range(ranks))
        self._records: list[RankRecord] = []

    def wait(self) -> list[RankRecord]:
        """Return the ranks' records once all have been written.

        Raises:
            UserError: a rank failed, or no rank wrote a byte for too long.
        """
        seen, since = -1, time.monotonic()
        while self._collect():
            if (now := self._bytes()) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > self._timeout:
                raise UserError(
                    f"ranks {sorted(self._missing)} did not write their files of the checkpoint",
                    where=str(self._work),
                    fix="check whether these ranks are still running; their partial files are in "
                    "this folder",
                    status=Exit.HANG,
                )
            time.sleep(POLL_SECONDS)
        return self._records

    def _collect(self) -> bool:
        """Read the records that exist; return whether some are still missing."""
        for rank in sorted(self._missing):
            if (note := self._work / failed_name(rank)).exists():
                raise UserError(f"rank {rank} could not save: {note.read_text(encoding='utf-8')}")
            if (path := self._work / record_name(rank)).exists():
                self._records.append(RankRecord.model_validate_json(path.read_bytes()))
                self._missing.remove(rank)
        return bool(self._missing)

    def _bytes(self) -> int:
        total = 0
        for entry in os.scandir(self._work):
            with suppress(FileNotFoundError):  # renamed since it was listed
                total += entry.stat().st_size
        return total


def write_new(path: Path, text: str) -> None:
    """Write a file atomically, without recreating a folder that another rank has removed."""
    temporary = path.with_name(f".{path.name}")
    handle = open_in_place(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
    """Rename; move aside what is there already (broken at the resume, or saved twice)."""
    aside = target.with_name(f"{REMOVED_PREFIX}{work.name.lstrip('.')}")
    if target.exists():
        target.rename(aside)
    work.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
