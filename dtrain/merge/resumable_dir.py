"""A folder that is made piece by piece, by one process or many, and appears whole or not at all.

`.OUT.making/` beside OUT holds `model/`, which becomes OUT, and a record for each piece that is
done. A record counts only under the plan it was made by: another plan starts from nothing.

Whoever makes the same folder by the same plan joins in, on this node or another one: each takes
pieces that nobody has, those of a process that was killed too, and one of them publishes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import fsync_folder, read_sealed, write_sealed
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.locks import ShardLocks
from dtrain.core.log import say

PLAN, RECORD, MODEL, CLAIMS = "plan.json", ".done.json", "model", ".claims"
BEGIN, PRESENT, PUBLISH, FIRST_PIECE = range(4)  # what is claimed; then the pieces, by number


def work_folder(out: Path) -> Path:
    """Where OUT is made: beside it, hidden."""
    return out.absolute().parent / f".{out.name}.making"


class Work:
    """The making of one folder, beside others who make the same.

    Args:
        plan: everything that decides the content, plain values.

    Raises:
        UserError: another process is making the folder by another plan.
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self._out, self._folder = out.absolute(), work_folder(out)
        self._plan = {"plan": fingerprint(plan)}
        self._claims = self._begun()
        if self._is_alone():
            self._tidy()
        elif not self._is_ours():
            self.leave()
            raise UserError("is being made by another process", where=str(out), fix="wait for it")
        self._claims.acquire(PRESENT, wait=True, shared=True)
        self._claims.release(BEGIN)

    @property
    def target(self) -> Path:
        """The folder to write into."""
        return self._folder / MODEL

    def take(self, number: int, *, wait: bool = False) -> bool:
        """Claim a piece; without `wait`, return False at once if another process is at it."""
        return self._claims.acquire(FIRST_PIECE + number, wait=wait)

    def give_back(self, number: int) -> None:
        """Give a piece back, done or not."""
        self._claims.release(FIRST_PIECE + number)

    def is_done(self, name: str) -> bool:
        """Whether nobody needs to make a file any more."""
        return self._record(name).is_file() or self._out.exists()

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Record a file that is on the disk; `after` is its hash."""
        write_sealed(self._record(name), record)

    def result(self, name: str) -> dict[str, Any]:
        """What was recorded of a finished file."""
        return read_sealed(self._record(name))

    def bytes_done(self) -> int:
        """Of files that are there already, finished or not: they need no more room."""
        return sum(path.stat().st_size for path in self.target.iterdir())

    def is_mine_to_publish(self) -> bool:
        """Whether this process is the one; once all pieces are done. Others wait until it has."""
        self._claims.acquire(PUBLISH, wait=True)
        return not self._out.exists()

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
        self._claims.acquire(BEGIN, wait=True)  # nobody joins what is being removed
        self._remove()

    def discard(self) -> None:
        """Remove what is left, unless others are still at it."""
        self._claims.acquire(BEGIN, wait=True)
        if self._is_alone():
            self._remove()
        self.leave()

    def leave(self) -> None:
        """Stop, to go on later."""
        self._claims.close()

    def _begun(self) -> ShardLocks:
        """The claims, with that on the beginning taken."""
        while True:
            with suppress(FileNotFoundError):  # who was last has just removed the folder
                claims = ShardLocks(self._folder / CLAIMS)
                claims.acquire(BEGIN, wait=True)
                if claims.is_current():
                    return claims
                claims.close()

    def _is_alone(self) -> bool:
        return self._claims.acquire(PRESENT)

    def _is_ours(self) -> bool:
        try:
            return read_sealed(self._folder / PLAN) == self._plan and self.target.is_dir()
        except UserError:
            return False

    def _tidy(self) -> None:
        """Keep what a call before has done by this plan, and nothing else."""
        if not self._is_ours():
            for path in self._folder.iterdir():
                if path.name != CLAIMS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.target.mkdir()
            write_sealed(self._folder / PLAN, self._plan)
        for record in self._folder.glob(f"*{RECORD}"):
            self._check(record)

    def _check(self, record: Path) -> None:
        """Remove a record if its file is not what was written."""
        path = self.target / record.name.removesuffix(RECORD)
        with suppress(UserError):
            if path.is_file() and file_hash(path) == read_sealed(record)["after"]:
                say(f"{path.name} is done already")
                return
        record.unlink()

    def _record(self, name: str) -> Path:
        return self._folder / f"{name}{RECORD}"

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
