"""Finished stages of another run, used in this one without training them again.

A stage of another run folder is this run's stage if both have the same identity. This run's folder
then contains a link to it, which nothing is ever written through.
"""

from __future__ import annotations

import os

from dtrain.checkpoints.identity import differences
from dtrain.config.schema import Recipe
from dtrain.core.log import say, warn
from dtrain.core.run_dir import RunDir
from dtrain.distributed.world import World
from dtrain.pipeline.stage_record import StageRecord


def reuse_stages(
    recipe: Recipe, source: RunDir, folders: dict[str, StageRecord], world: World
) -> list[str]:
    """Link the stages that another run has finished and this one has not started.

    Args:
        source: the run of `output.reuse`.
        folders: this run's stages, by name.

    Returns:
        Names of the stages that this run has links to, the same on all ranks.
    """
    if world.is_first:
        for stage in recipe.stages:
            _reuse(folders[stage.name], source, recipe.merges(stage))
    world.barrier()
    return [name for name, folder in folders.items() if folder.path.is_symlink()]


def _reuse(folder: StageRecord, source: RunDir, needs_merged: bool) -> None:
    name = folder.path.name
    if folder.path.is_symlink() and not folder.is_complete():
        warn(f"stage {name}: {folder.path.readlink()} is not the stage that was reused any more")
        folder.path.unlink()
    if folder.path.exists():
        return
    finished = StageRecord(source.stage(name).path, folder.inputs)
    if reason := _mismatch(finished, needs_merged):
        say(f"stage {name}: not reused from {source.path}: {reason}")
        return
    target = os.path.relpath(finished.path.resolve(), folder.path.parent.resolve())
    folder.path.symlink_to(target, target_is_directory=True)


def _mismatch(finished: StageRecord, needs_merged: bool) -> str:
    """Why another run's stage cannot be used; empty if it can."""
    record = finished.read()
    if record is None or not record["complete"]:
        return "it is not finished there"
    if record["identity"] != finished.identity:
        keys = [line.partition(":")[0] for line in differences(record["inputs"], finished.inputs)]
        return f"it differs in {', '.join(keys)}"
    if needs_merged and not finished.merge_manifest.is_file():
        return "it has no merged model"
    return ""


def drop_link(folder: StageRecord, world: World) -> None:
    """Remove the link to a reused stage, which is then trained here; called by all ranks."""
    if world.is_first and folder.path.is_symlink():
        folder.path.unlink()
    world.barrier()
