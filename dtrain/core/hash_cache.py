"""Hashes of large files, remembered for as long as a file's place, size and times stay the same.

A base of 140 GB is hashed once on a machine, not at each run and each merge. What checks that
files are whole (`verify`, resuming) hashes them anew.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dtrain.core.cache_paths import cache_folder
from dtrain.core.errors import UserError
from dtrain.core.files import write_atomic
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.locks import FolderLock

REMEMBER_FROM_BYTES = 1 << 24  # a smaller file is hashed as fast as its hash is looked up
SETTLED_SECONDS = 2.0  # a file younger than that may change again without a change of its time
State = list[int]


def file_state(path: Path) -> State:
    """What changes when a file's content does.

    The time of the last change of any kind is the last: unlike that of the content, nobody sets it,
    so a copy that keeps times (`cp -p`, `rsync -t`) is not taken for what it overwrote.
    """
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def lookup_hash(path: Path) -> str | None:
    """A file's hash, if it is known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(_place(path).read_text())
        if entry["state"] == file_state(path):
            return str(entry["blake3"])
    return None


def remember_hash(path: Path, digest: str, state: State, *, ours: bool = False) -> None:
    """Keep a file's hash, unless the file was changed meanwhile, or may have been.

    Args:
        state: of the file before it was read.
        ours: nobody else can have written to it.
    """
    settled = ours or time.time() - state[-1] / 1e9 > SETTLED_SECONDS
    if settled and state == file_state(path):
        entry = {"file": str(path.resolve()), "state": state, "blake3": digest}
        with suppress(OSError):  # it is a matter of speed only
            write_atomic(_place(path), json.dumps(entry))


def cached_hash(path: Path) -> str:
    """A file's hash, read only if it is not known."""
    with FolderLock(_folder()):  # of all ranks of a node one reads
        if (known := lookup_hash(path)) is not None:
            return known
        state = file_state(path)
        digest = file_hash(path)
        remember_hash(path, digest, state)
    return digest


@dataclass(frozen=True)
class FileIdentity:
    """A file as it was before its content was hashed.

    Attributes:
        state: of `state_of`.
        settled: a change after that moment shows in the state.
    """

    path: Path
    digest: str
    state: tuple[int, ...]
    settled: bool

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Hash a file; a large one only if its hash is not known.

        Raises:
            UserError: it cannot be read.
        """
        try:
            state = file_state(path)
            settled = time.time() - state[-1] / 1e9 > SETTLED_SECONDS
            large = path.stat().st_size >= REMEMBER_FROM_BYTES
            digest = cached_hash(path) if large else file_hash(path)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
        return cls(path, digest, tuple(state), settled)

    def check_unchanged(self, name: str, *, again: bool = False) -> None:
        """Check that the file is the one that was hashed.

        Args:
            name: of the file, for the message.
            again: hash it once more where its state alone cannot show a change.

        Raises:
            UserError: it was changed, replaced or removed.
        """
        try:
            same = tuple(file_state(self.path)) == self.state
            if same and again and not self.settled:
                same = file_hash(self.path) == self.digest
        except OSError:
            same = False
        if not same:
            fix = "wait until the file is written, then start again"
            raise UserError("the file changed while it was read", where=name, fix=fix)


def _place(path: Path) -> Path:
    return _folder() / f"{fingerprint(str(path.resolve()))[:32]}.json"


def _folder() -> Path:
    return cache_folder() / "hashes"
