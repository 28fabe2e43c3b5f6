"""Which checkpoints stay: the newest few, the best, every n-th."""

from __future__ import annotations

from pathlib import Path

from dtrain.checkpoints.file_names import step_of
from dtrain.checkpoints.folder import LOSS, complete_folders, remove
from dtrain.checkpoints.reader import Checkpoint
from dtrain.core.errors import UserError
from dtrain.core.ownership import Untrusted


def retain(folder: Path, keep_newest: int, best: bool, every: int | None) -> list[int]:
    """Remove all checkpoints of a stage but those asked for.

    A checkpoint that cannot be used does not count as one of the newest, and goes once it is
    older than all of them. One that a person has to look at is left alone.

    Args:
        folder: the stage's checkpoints.
        keep_newest: how many of the newest stay (at least one).
        best: keep the one with the least held-out loss too; the older one of two alike.
        every: keep those whose step is a multiple of this too.

    Returns:
        The steps that were removed, oldest first.
    """
    usable, broken = _sorted_out(folder)
    newest = sorted(usable)[-max(keep_newest, 1) :]
    keep = {*newest, *(step for step in usable if every and step % every == 0)}
    losses = [(loss, step) for step, loss in usable.items() if loss is not None]
    if best and losses:
        keep.add(min(losses)[1])
    gone = [step for step in usable if step not in keep]
    gone += [step for step in broken if newest and step < newest[0]]
    paths = {step_of(path): path for path in complete_folders(folder)}
    for step in sorted(gone):
        remove(paths[step])
    return sorted(gone)


def _sorted_out(folder: Path) -> tuple[dict[int, float | None], list[int]]:
    """Usable step → held-out loss, and the steps of broken ones."""
    usable: dict[int, float | None] = {}
    broken: list[int] = []
    for path in complete_folders(folder):
        try:
            found = Checkpoint.open(path)
        except Untrusted:
            continue
        except UserError:
            broken.append(step_of(path) or 0)
            continue
        usable[found.step] = found.state.get(LOSS)
    return usable, broken
