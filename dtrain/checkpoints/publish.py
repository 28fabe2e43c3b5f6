"""Rank 0's part of a save: wait for what all ranks wrote, check it, make it a checkpoint."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.checkpoints.manifest import MANIFEST, Manifest, Record, merge_records
from dtrain.checkpoints.names import REMOVED_PREFIX, failed_name, record_name
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import fsync_folder

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
