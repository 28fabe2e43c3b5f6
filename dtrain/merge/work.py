"""A folder that is made piece by piece, goes on after a kill, and appears whole or not at all.

`.OUT.making/` beside OUT holds `model/`, which becomes OUT, and a record for each piece that is
done. A record counts only under the plan it was made by: another plan starts from nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import FolderLock, fsync_folder, read_sealed, write_sealed
from dtrain.core.hashes import file_sha256, fingerprint
from dtrain.core.log import say

PLAN, RECORD, MODEL = "plan.json", ".done.json", "model"


def work_folder(out: Path) -> Path:
    """Where OUT is made: beside it, hidden."""
    return out.absolute().parent / f".{out.name}.making"


class Work:
    """The making of one folder, locked against others.

    Args:
        plan: everything that decides the content, plain values.

    Raises:
        UserError: another process is making the same folder.
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self._out, self._folder = out.absolute(), work_folder(out)
        self._plan = {"plan": fingerprint(plan)}
        self._lock = FolderLock(self._folder)
        if not self._lock.acquire():
            what = f"is being made by another process ({self._lock.holder()})"
            raise UserError(what, where=str(out), fix="wait for it")
        if not self._is_ours():
            self._clear()
            self.target.mkdir()
            write_sealed(self._folder / PLAN, self._plan)

    @property
    def target(self) -> Path:
        """The folder to write into."""
        return self._folder / MODEL

    def done(self, name: str) -> dict[str, Any] | None:
        """What was recorded of a finished file, if it still is what was written."""
        path, record = self.target / name, self._folder / f"{name}{RECORD}"
        try:
            known = read_sealed(record)
        except UserError:
            return None
        if not path.is_file() or file_sha256(path) != known["after"]:
            return None
        say(f"{name} is done already")
        return known

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Record a file that is on the disk; `after` is its SHA-256."""
        write_sealed(self._folder / f"{name}{RECORD}", record)

    def bytes_done(self) -> int:
        """Of files that are there already, finished or not: they need no more room."""
        return sum(path.stat().st_size for path in self.target.iterdir())

    def publish(self, names: Collection[str]) -> None:
        """Let the folder appear under its name, with these files.

        What else is there was being written, under a passing name, when a call before was killed.
        """
        for path in self.target.iterdir():
            if path.name not in names:
                path.unlink()
                continue
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(self.target)
        os.rename(self.target, self._out)
        fsync_folder(self._out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove what is left."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()

    def leave(self) -> None:
        """Stop, to go on later."""
        self._lock.release()

    def _is_ours(self) -> bool:
        try:
            return read_sealed(self._folder / PLAN) == self._plan and self.target.is_dir()
        except UserError:
            return False

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            if path == self._lock.path:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
