"""SHA-256 of large files, remembered for as long as a file's place, size and times stay the same.

A base of 140 GB is hashed once on a machine, not at each run and each merge. What checks that
files are whole (`verify`, resuming) hashes them anew.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from dtrain.core.files import FolderLock, write_atomic
from dtrain.core.folders import cache_folder
from dtrain.core.hashes import file_sha256, fingerprint

SETTLED_SECONDS = 2.0  # a file younger than that may change again without a change of its time
State = list[int]


def state_of(path: Path) -> State:
    """What changes when a file's content does.

    The time of the last change of any kind is the last: unlike that of the content, nobody sets it,
    so a copy that keeps times (`cp -p`, `rsync -t`) is not taken for what it overwrote.
    """
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def known_sha256(path: Path) -> str | None:
    """A file's hash, if it is known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(_place(path).read_text())
        if entry["state"] == state_of(path):
            return str(entry["sha256"])
    return None


def remember_sha256(path: Path, digest: str, state: State, *, ours: bool = False) -> None:
    """Keep a file's hash, unless the file was changed meanwhile, or may have been.

    Args:
        state: of the file before it was read.
        ours: nobody else can have written to it.
    """
    settled = ours or time.time() - state[-1] / 1e9 > SETTLED_SECONDS
    if settled and state == state_of(path):
        entry = {"file": str(path.resolve()), "state": state, "sha256": digest}
        with suppress(OSError):  # it is a matter of speed only
            write_atomic(_place(path), json.dumps(entry))


def sha256_of(path: Path) -> str:
    """A file's hash, read only if it is not known."""
    with FolderLock(_folder()):  # of all ranks of a node one reads
        if (known := known_sha256(path)) is not None:
            return known
        state = state_of(path)
        digest = file_sha256(path)
        remember_sha256(path, digest, state)
    return digest


def _place(path: Path) -> Path:
    return _folder() / f"{fingerprint(str(path.resolve()))[:32]}.json"


def _folder() -> Path:
    return cache_folder() / "hashes"
