"""A stage's folder of checkpoints: which are there, and which is the newest that can be used."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dtrain.checkpoints.file_names import REMOVED_PREFIX, step_of, unfinished_step_of
from dtrain.checkpoints.reader import Checkpoint
from dtrain.core.errors import UserError
from dtrain.core.ownership import Untrusted

LOSS = "held_out_loss"


@dataclass(frozen=True)
class Listed:
    """One checkpoint as a person sees it.

    Args:
        loss: held-out loss, if there is one.
        size: bytes on disk.
        complete: whether it can be used, as far as is known without hashing.
        verified: whether its hashes are right; None if nobody looked.
        problem: why it cannot be used; empty if nothing is known against it.
    """

    step: int
    loss: float | None
    size: int
    complete: bool
    verified: bool | None
    problem: str


def newest_complete(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every hash is right, and why newer ones were passed over.

    Raises:
        Untrusted: a newer one may have been tampered with, or is of another version. To start
            from an older one, or from nothing, could be a loss of days: a person has to look.
    """
    reasons: list[str] = []
    unfinished = _unfinished(folder)
    for path in complete_folders(folder):
        try:
            found = Checkpoint.open(path)
            found.verify()
        except Untrusted:
            raise
        except UserError as error:
            reasons.append(f"step {step_of(path)} cannot be used: {error}")
            continue
        return found, _not_finished(unfinished, found.step) + reasons
    return None, _not_finished(unfinished, -1) + reasons


def _not_finished(unfinished: list[Path], newest: int) -> list[str]:
    steps = {step for path in unfinished if (step := unfinished_step_of(path) or 0) > newest}
    return [f"the save of step {step} was not finished" for step in sorted(steps, reverse=True)]


def complete_folders(folder: Path) -> list[Path]:
    """Folders named like complete checkpoints, newest first."""
    found = [path for path in _entries(folder) if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def _unfinished(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if unfinished_step_of(path) is not None]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot be listed: {error.strerror}", where=str(folder)) from error


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what saves and removals of dead attempts left behind; the names are returned.

    Call it while nobody saves here: at the start, under the run's lock, before a Saver is made.
    """
    left = [path for path in _entries(folder) if path.name.startswith(REMOVED_PREFIX)]
    left += _unfinished(folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in left]


def remove(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that half of one never looks complete."""
    aside = path.with_name(f"{REMOVED_PREFIX}{path.name.lstrip('.')}.{os.getpid()}")
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def list_checkpoints(folder: Path, *, verify: bool = False) -> list[Listed]:
    """All checkpoints of a stage by step, unfinished ones included; `verify` hashes them again."""
    listed = [_listed(path, verify) for path in complete_folders(folder)]
    for path in _unfinished(folder):
        step = unfinished_step_of(path) or 0
        listed.append(Listed(step, None, _bytes(path), False, None, "its save was not finished"))
    return sorted(listed, key=lambda one: one.step)


def _listed(path: Path, verify: bool) -> Listed:
    step = step_of(path) or 0
    try:
        found = Checkpoint.open(path)
    except UserError as error:
        return Listed(step, None, _bytes(path), False, None, str(error))
    loss = found.state.get(LOSS)
    if not verify:
        return Listed(step, loss, found.size_bytes, True, None, "")
    try:
        found.verify()
    except UserError as error:
        return Listed(step, loss, found.size_bytes, False, False, str(error))
    return Listed(step, loss, found.size_bytes, True, True, "")


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
