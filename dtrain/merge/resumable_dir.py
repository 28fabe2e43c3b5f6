"""A directory that is built file by file, by one process or many, and appears whole or not at all.

`.OUT.making/` next to OUT holds `model/`, which becomes OUT, and a record for each finished file.
A record counts only under the plan that it was made with: another plan starts from nothing.

Processes that build the same directory with the same plan, on this node or another one, share the
work: each claims files that no live process has claimed, and one of them publishes.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import fsync_file, fsync_folder, read_sealed, remove_entry, write_sealed
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.locks import ShardLocks
from dtrain.core.log import say
from dtrain.core.ownership import (
    check_keeps_owners,
    check_own_file,
    check_own_folder,
    share_with_group,
)

PLAN, RECORD, MODEL, LOCKS = "plan.json", ".done.json", "model", ".locks"
BEGIN, PRESENT, PUBLISH, FIRST_FILE = range(4)  # what can be claimed; then the files by index


def making_folder(out: Path) -> Path:
    """Return the hidden folder next to OUT where it is built."""
    return out.absolute().parent / f".{out.name}.making"


class ResumableDir:
    """The work on one directory, shared with other processes that build the same.

    Args:
        plan: everything that decides the content, plain values.

    Raises:
        UserError: another process is building the directory with another plan.
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self._out, self._folder = out.absolute(), making_folder(out)
        self._plan = {"plan": fingerprint(plan)}
        self._locks = self._open_locks()
        if self._is_alone():
            self._clean()
        elif not self._is_same_plan():
            self.close()
            fix = "wait until it has finished, or choose another folder"
            raise UserError("is being made by another process", where=str(out), fix=fix)
        self._locks.acquire(PRESENT, wait=True, shared=True)
        self._locks.release(BEGIN)

    @property
    def target(self) -> Path:
        """The folder to write into."""
        return self._folder / MODEL

    def claim(self, index: int, *, wait: bool = False) -> bool:
        """Claim a file; without `wait`, return False at once if another process has claimed it."""
        return self._locks.acquire(FIRST_FILE + index, wait=wait)

    def release(self, index: int) -> None:
        """Release a file, finished or not."""
        self._locks.release(FIRST_FILE + index)

    def is_done(self, name: str) -> bool:
        """Return whether a file needs no more work."""
        return self._record_path(name).is_file() or self._out.exists()

    def record(self, name: str, facts: dict[str, Any]) -> None:
        """Record a file that is on the disk; `after` in its facts is its hash."""
        write_sealed(self._record_path(name), facts)

    def recorded(self, name: str) -> dict[str, Any]:
        """Return what was recorded about a finished file."""
        return read_sealed(self._record_path(name))

    def bytes_written(self) -> int:
        """Return the bytes of all files so far, finished or not: they need no more disk space.

        0 if another process has published the folder.
        """
        while self.target.is_dir():
            with suppress(FileNotFoundError):  # another process has just renamed a file
                return sum(path.stat().st_size for path in self.target.iterdir())
        return 0

    def claim_publishing(self) -> bool:
        """Return whether this process must publish; the others wait until one has published.

        Call it once all files are finished.
        """
        self._locks.acquire(PUBLISH, wait=True)
        return not self._out.exists()

    def publish(self, names: Collection[str]) -> None:
        """Rename the folder to OUT, with these files.

        Any other file was being written under a temporary name when an earlier call was killed.
        """
        for path in self.target.iterdir():
            if path.name not in names:
                path.unlink()
                continue
            fsync_file(path)
        fsync_folder(self.target)
        share_with_group(self.target, self._out.parent)
        os.rename(self.target, self._out)
        fsync_folder(self._out.parent)
        self._locks.acquire(BEGIN, wait=True)  # no process joins while the folder is being removed
        self._remove()

    def discard(self) -> None:
        """Remove everything, unless other processes are still working on it."""
        self._locks.acquire(BEGIN, wait=True)
        if self._is_alone():
            self._remove()
        self.close()

    def close(self) -> None:
        """Stop; a later call with the same plan continues."""
        self._locks.close()

    def _open_locks(self) -> ShardLocks:
        """Return the locks, with BEGIN locked."""
        while True:
            with suppress(FileNotFoundError):  # the last process has just removed the folder
                self._check_folder()
                locks = ShardLocks(self._folder / LOCKS)
                locks.acquire(BEGIN, wait=True)
                if locks.is_current():
                    return locks
                locks.close()

    def _check_folder(self) -> None:
        """Create the folder; who could put something into it could make this process delete more.

        Raises:
            FileNotFoundError: it has just been removed.
            Untrusted: another user made it, or anyone may replace it.
        """
        check_keeps_owners(self._folder.parent)
        with suppress(FileExistsError):  # a dangling link exists, too
            self._folder.mkdir(mode=0o700, parents=True)
        if os.path.lexists(self._folder):
            check_own_folder(self._folder)

    def _is_alone(self) -> bool:
        return self._locks.acquire(PRESENT)

    def _has_this_plan(self) -> bool:
        try:
            check_own_folder(self.target)
        except UserError:
            return False
        return self._is_same_plan()

    def _is_same_plan(self) -> bool:
        """Whether the work has this plan; while it is published, it has no folder to write into."""
        try:
            return read_sealed(check_own_file(self._folder / PLAN)) == self._plan
        except UserError:
            return False

    def _clean(self) -> None:
        """Keep what an earlier call finished with this plan, and nothing else."""
        if not self._has_this_plan():
            for path in self._folder.iterdir():
                if path.name != LOCKS:
                    remove_entry(path)
            self.target.mkdir(mode=0o700)
            write_sealed(self._folder / PLAN, self._plan)
        for path in self.target.iterdir():
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                remove_entry(path)  # a file there is written again, which must not follow a link
        for record in self._folder.glob(f"*{RECORD}"):
            self._check(record)

    def _check(self, record: Path) -> None:
        """Remove a record if its file does not have the recorded hash."""
        path = self.target / record.name.removesuffix(RECORD)
        with suppress(UserError):
            if path.is_file() and file_hash(path) == read_sealed(record)["after"]:
                say(f"{path.name} is done already")
                return
        record.unlink()

    def _record_path(self, name: str) -> Path:
        return self._folder / f"{name}{RECORD}"

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
