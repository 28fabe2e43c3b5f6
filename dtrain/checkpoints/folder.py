"""A stage's folder of checkpoints: list them, find the newest usable one, remove old ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoints.manifest import REMOVED_PREFIX, step_of, unfinished_step_of
from dtrain.checkpoints.reader import Checkpoint
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.core.ownership import Untrusted
from dtrain.distributed.world import World

LOSS = "held_out_loss"
SCORE = "score"  # lowest in the best checkpoint: the loss, or a metric with its sign changed
WATCHED = "watched"  # what was measured; other scores cannot be compared with it


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint in a list.

    Attributes:
        loss: held-out loss, if it was measured.
        size: bytes on disk.
        complete: whether it can be used, as far as is known without hashing.
        verified: whether its hashes are right; None if they were not checked.
        problem: why it cannot be used; empty if no reason is known.
    """

    step: int
    loss: float | None
    size: int
    complete: bool
    verified: bool | None
    problem: str


def newest_complete(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint whose hashes are all right, and why newer ones were skipped.

    Raises:
        Untrusted: a newer one may have been tampered with, or has another format. Starting from an
            older one, or from nothing, could lose days of work: a person has to decide.
    """
    reasons: list[str] = []
    unfinished = _unfinished(folder)
    for path in complete_folders(folder):
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
        except Untrusted:
            raise
        except UserError as error:
            reasons.append(f"step {step_of(path)} cannot be used: {error}")
            continue
        return checkpoint, _not_finished(unfinished, checkpoint.step) + reasons
    return None, _not_finished(unfinished, -1) + reasons


def newest_on_first_rank(folder: Path, world: World) -> Checkpoint | None:
    """The newest complete checkpoint that the first rank finds: all ranks must use the same."""
    checkpoint, name = None, ""
    if world.is_first:
        checkpoint, passed_over = newest_complete(folder)
        for reason in passed_over:
            say(f"passed over: {reason}")
        name = checkpoint.folder.name if checkpoint else ""
    name = world.broadcast_text(name)
    if checkpoint is None and name:
        checkpoint = Checkpoint.open(folder / name)
    return checkpoint


def _not_finished(unfinished: list[Path], newest: int) -> list[str]:
    steps = {step for path in unfinished if (step := unfinished_step_of(path) or 0) > newest}
    return [f"the save of step {step} was not finished" for step in sorted(steps, reverse=True)]


def complete_folders(folder: Path) -> list[Path]:
    """Return the folders named like complete checkpoints, newest first."""
    paths = [path for path in _entries(folder) if step_of(path) is not None]
    return sorted(paths, key=lambda path: step_of(path) or 0, reverse=True)


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
    """Remove what interrupted saves and removals left behind; return the names.

    Call it while no process saves here: at the start, under the run's lock, before any Saver.
    """
    left = [path for path in _entries(folder) if path.name.startswith(REMOVED_PREFIX)]
    left += _unfinished(folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in left]


def remove(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a half-removed one never looks complete."""
    aside = path.with_name(f"{REMOVED_PREFIX}{path.name.lstrip('.')}.{os.getpid()}")
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def list_checkpoints(folder: Path, *, verify: bool = False) -> list[CheckpointInfo]:
    """Return all checkpoints of a stage by step, unfinished ones too; `verify` hashes them.

    One that the run removes or renames meanwhile is left out.
    """
    listed: list[CheckpointInfo] = []
    for path in [*complete_folders(folder), *_unfinished(folder)]:
        with suppress(FileNotFoundError):
            info = _listed(path, verify)
            listed += [info] if path.exists() else []
    return sorted(listed, key=lambda info: info.step)


def _listed(path: Path, verify: bool) -> CheckpointInfo:
    if (step := step_of(path)) is None:
        step, problem = unfinished_step_of(path) or 0, "its save was not finished"
        return CheckpointInfo(step, None, _bytes(path), False, None, problem)
    try:
        checkpoint = Checkpoint.open(path)
    except UserError as error:
        return CheckpointInfo(step, None, _bytes(path), False, None, str(error))
    loss = checkpoint.state.get(LOSS)
    if not verify:
        return CheckpointInfo(step, loss, checkpoint.size_bytes, True, None, "")
    try:
        checkpoint.verify()
    except UserError as error:
        return CheckpointInfo(step, loss, checkpoint.size_bytes, False, False, str(error))
    return CheckpointInfo(step, loss, checkpoint.size_bytes, True, True, "")


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove_old_checkpoints(
    folder: Path, keep_newest: int, best: bool, every: int | None
) -> list[int]:
    """Remove all checkpoints of a stage except those to keep.

    A checkpoint that cannot be used does not count as one of the newest, and is removed once it is
    older than all of them. One that is untrusted is left alone: a person has to decide.

    Args:
        keep_newest: how many of the newest to keep (at least one).
        best: also keep the best one (`best_step`).
        every: also keep those whose step is a multiple of this.

    Returns:
        The steps that were removed, oldest first.
    """
    usable, broken = _usable_and_broken(folder)
    newest = sorted(usable)[-max(keep_newest, 1) :]
    keep = {*newest, *(step for step in usable if every and step % every == 0)}
    if best and (step := best_step(usable)) is not None:
        keep.add(step)
    removed = [step for step in usable if step not in keep]
    removed += [step for step in broken if newest and step < newest[0]]
    paths = {step_of(path): path for path in complete_folders(folder)}
    for step in sorted(removed):
        remove(paths[step])
    return sorted(removed)


def best_step(states: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the step with the lowest score, of two equal ones the older; None without any.

    Only checkpoints that were measured as the newest measured one was are compared.

    Args:
        states: a checkpoint's state, by its step.
    """
    measured = {step: state for step, state in states.items() if state.get(SCORE) is not None}
    if not measured:
        return None
    watched = measured[max(measured)].get(WATCHED)
    scores = [(s[SCORE], step) for step, s in measured.items() if s.get(WATCHED) == watched]
    return min(scores)[1]


def states_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the state of each usable checkpoint of a stage, by its step."""
    return _usable_and_broken(folder)[0]


def _usable_and_broken(folder: Path) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Return the states of usable checkpoints by step, and the steps of broken ones."""
    usable: dict[int, dict[str, Any]] = {}
    broken: list[int] = []
    for path in complete_folders(folder):
        try:
            checkpoint = Checkpoint.open(path)
        except Untrusted:
            continue
        except UserError:
            broken.append(step_of(path) or 0)
            continue
        usable[checkpoint.step] = checkpoint.state
    return usable, broken
