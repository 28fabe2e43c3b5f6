"""A stage's checkpoints: the newest one to resume from, and saves in the background."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.checkpoints.folder import (
    best_step,
    clean_leftovers,
    newest_on_first_rank,
    remove_old_checkpoints,
    states_of,
)
from dtrain.checkpoints.identity import check_same_inputs
from dtrain.checkpoints.manifest import step_name
from dtrain.checkpoints.parameter_shards import split_among_replicas
from dtrain.checkpoints.reader import Checkpoint
from dtrain.checkpoints.saver import Saver
from dtrain.config.schema import Output
from dtrain.core.errors import UserError
from dtrain.core.log import say, warn
from dtrain.core.ownership import check_own_folder
from dtrain.distributed.world import World
from dtrain.engines.base import Engine
from dtrain.training.progress import StageProgress, is_due


class Checkpointer:
    """Saves and finds the checkpoints of one stage. All ranks call it alike.

    Args:
        folder: of the stage's checkpoints, on a file system that all ranks see.
        inputs: settings and data that the stage is made from; recorded in each checkpoint, and
            compared with those of the one that is resumed.
        dtype: of the base in this run, recorded too.
        every_steps: between two saves; None saves only at the end.
        output: how many checkpoints to keep.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        inputs: dict[str, Any],
        dtype: str,
        every_steps: int | None,
        output: Output,
    ) -> None:
        self._folder, self._world, self._every_steps = folder, world, every_steps
        self._inputs, self._dtype = inputs, dtype
        keep, keep_every = output.keep_checkpoints, output.keep_every_steps
        self._saver = Saver(
            folder,
            rank=world.rank,
            ranks=world.size,
            attempt=world.broadcast_text(uuid.uuid4().hex[:8]),
            on_published=lambda path: remove_old_checkpoints(
                path.parent, keep, best=True, every=keep_every
            ),
        )

    @property
    def save_seconds(self) -> float:
        """Duration of the last save, from its call until it was on disk."""
        return self._saver.seconds

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is saved after `step` steps."""
        return is_due(step, self._every_steps)

    def save(self, engine: Engine, stage: StageProgress, measured: Mapping[str, Any]) -> None:
        """Copy the engine's trainable state to host memory and write it in the background.

        Args:
            measured: on the watched set after this step (`HeldOutEvaluator.measured`).
        """
        state = {
            "dtype": self._dtype,
            "updates": engine.update_count,
            "rate_square_sum": engine.rate_square_sum,
            "progress": asdict(stage),
            "inputs": self._inputs,
            **measured,
        }
        shards = split_among_replicas(engine.saved_shards(), *engine.replica)
        self._saver.save(stage.step, shards, state)

    def wait_for_save(self) -> None:
        """Wait until the save under way, if any, is on disk."""
        self._saver.wait()

    def best(self, last: Mapping[str, Any], last_step: int) -> tuple[Checkpoint, Mapping[str, Any]]:
        """The best checkpoint of the stage, its files verified, and what was measured on it.

        A better one whose files were changed is passed over with a warning.

        Args:
            last: what was measured after the last step.
        """
        step = 0
        if self._world.is_first:
            states = {**states_of(self._folder), last_step: dict(last)}
            while (step := best_step(states) or last_step) != last_step:
                if self._is_intact(step):
                    break
                del states[step]
        step = int(self._world.sum([float(step)])[0])
        checkpoint = Checkpoint.open(self._folder / step_name(step))
        return checkpoint, last if step == last_step else checkpoint.state

    def _is_intact(self, step: int) -> bool:
        path = self._folder / step_name(step)
        try:
            Checkpoint.open(path).verify()
        except UserError as error:
            warn(f"step {step} is better, but cannot be used: {error}")
            return False
        return True

    def find_resumable(self, allowed_changes: Iterable[str]) -> Checkpoint | None:
        """The newest complete checkpoint, after removing what interrupted saves left behind.

        Args:
            allowed_changes: keys of the inputs that may differ from the checkpoint's.

        Raises:
            UserError: it was made from other inputs, or other users may write to the folder.
        """
        if self._folder.exists():
            check_own_folder(self._folder.resolve())
        checkpoint = newest_on_first_rank(self._folder, self._world)
        if checkpoint is not None:
            for change in check_same_inputs(
                checkpoint.state["inputs"], self._inputs, set(allowed_changes)
            ):
                say(f"allowed to change: {change}")
            say(f"resuming from step {checkpoint.step} ({checkpoint.folder})")
        self._world.barrier()  # until no rank reads the folder any more
        if self._world.is_first:
            clean_leftovers(self._folder)
        self._world.barrier()
        return checkpoint


def open_final_checkpoint(folder: Path, world: World, step: int) -> Checkpoint:
    """The checkpoint of the last step, verified by the first rank."""
    checkpoint = newest_on_first_rank(folder, world)
    assert checkpoint is not None and checkpoint.step == step
    return checkpoint
