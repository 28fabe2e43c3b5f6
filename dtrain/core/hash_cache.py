"""Hashes of large files, cached as long as path, size and times of the file stay the same.

A base of 140 GB is hashed once on a machine, not for each run and each merge. Checks that a file is
intact (`verify`, resuming) hash it again.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.core.cache_paths import cache_folder
from dtrain.core.errors import UserError
from dtrain.core.files import write_atomic
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.locks import FolderLock

CACHE_FROM_BYTES = 1 << 24  # hashing a smaller file is as fast as looking up its hash
SETTLED_SECONDS = 2.0  # a younger file may change again within the resolution of its times


@dataclass(frozen=True)
class FileState:
    """What changes when a file's content does.

    Attributes:
        values: inode, size, and the times of the last change of the content and of any kind. Unlike
            the first, the second cannot be set, so a copy that preserves times (`cp -p`,
            `rsync -t`) is not mistaken for the file that it overwrote.
        settled: any change after this state was read gives another one.
    """

    values: tuple[int, ...]
    settled: bool = field(compare=False)


def file_state(path: Path) -> FileState:
    """Return a file's state now."""
    now, status = time.time(), path.stat()
    values = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return FileState(values, settled=now - status.st_ctime_ns / 1e9 > SETTLED_SECONDS)


def lookup_hash(path: Path) -> str | None:
    """Return a file's hash if it is cached."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(_entry_path(path).read_text(encoding="utf-8"))
        if entry["state"] == list(file_state(path).values):
            return str(entry["blake3"])
    return None


def remember_hash(path: Path, digest: str, state: FileState, *, written_here: bool = False) -> None:
    """Cache a file's hash, unless the file changed since it was read, or may have.

    Args:
        state: of the file before it was read.
        written_here: this process wrote the file, so no later change can have gone unnoticed.
    """
    if (written_here or state.settled) and state == file_state(path):
        entry = {"file": str(path.resolve()), "state": state.values, "blake3": digest}
        with suppress(OSError):  # the cache only saves time
            write_atomic(_entry_path(path), json.dumps(entry))


def cached_hash(path: Path) -> str:
    """Return a file's hash; read the file only if the hash is not cached."""
    lock = FolderLock(_folder())
    with suppress(OSError, UserError):  # a cache that is read-only, or has no locks
        lock.acquire(wait=True)  # of all ranks on a node, one reads the file
    try:
        if (digest := lookup_hash(path)) is not None:
            return digest
        state = file_state(path)
        digest = file_hash(path)
        remember_hash(path, digest, state)
        return digest
    finally:
        lock.release()


@dataclass(frozen=True)
class FileIdentity:
    """A file's hash, and its state before it was hashed.

    Attributes:
        digest: hash of the content.
        state: as `file_state` returns it.
    """

    path: Path
    digest: str
    state: FileState

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Hash a file; a large one only if its hash is not cached.

        Raises:
            UserError: it cannot be read.
        """
        try:
            state = file_state(path)
            large = path.stat().st_size >= CACHE_FROM_BYTES
            digest = cached_hash(path) if large else file_hash(path)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
        return cls(path, digest, state)

    def check_unchanged(self, name: str, *, again: bool = False) -> None:
        """Check that the file is the one that was hashed.

        Args:
            name: of the file, for the message.
            again: hash it again where its state alone cannot show a change.

        Raises:
            UserError: it was changed, replaced or removed.
        """
        try:
            same = file_state(self.path) == self.state
            if same and again and not self.state.settled:
                same = file_hash(self.path) == self.digest
        except OSError:
            same = False
        if not same:
            fix = "wait until the file is written, then start again"
            raise UserError("the file changed while it was read", where=name, fix=fix)


def _entry_path(path: Path) -> Path:
    return _folder() / f"{fingerprint(str(path.resolve()))[:32]}.json"


def _folder() -> Path:
    return cache_folder() / "hashes"
