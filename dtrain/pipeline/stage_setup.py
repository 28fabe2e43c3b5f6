"""The settings, inputs and surroundings of one stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dtrain.config.schema import Recipe, Stage
from dtrain.distributed.hang_watchdog import HangWatchdog
from dtrain.distributed.world import World
from dtrain.methods.base import Method, build_method
from dtrain.models.load import resolve_dtype
from dtrain.pipeline.evaluator import Evaluations
from dtrain.pipeline.stage_inputs import Inputs
from dtrain.pipeline.stage_record import StageRecord
from dtrain.training.preemption import StopFlag


@dataclass(frozen=True)
class StageSetup:
    """What a stage is run with.

    Attributes:
        base: folder of the model that the stage starts from: the recipe's, or the merged model
            of the stage before.
    """

    recipe: Recipe
    stage: Stage
    folder: StageRecord
    base: Path
    inputs: Inputs
    evaluations: Evaluations
    world: World
    stop: StopFlag
    watchdog: HangWatchdog

    @cached_property
    def method(self) -> Method[Any]:
        """The stage's fine-tuning method."""
        return build_method(self.stage.method)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype on this device, where the recipe may say `auto`."""
        return resolve_dtype(self.recipe.model.dtype, self.world.device)

    @property
    def is_merged(self) -> bool:
        """Whether the stage writes a merged model."""
        return self.recipe.merges(self.stage)
