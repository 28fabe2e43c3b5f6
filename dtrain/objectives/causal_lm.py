"""Next-token prediction: continued pretraining on every token, fine-tuning on answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dtrain.config.schema import EvaluationSet, Stage
from dtrain.data.loader import MicroBatch
from dtrain.data.packed_dataset import BatchCounts
from dtrain.data.packing import Packing
from dtrain.data.prepare import DatasetSpec
from dtrain.data.tokenize import AnswerEncoder, FullTextEncoder
from dtrain.models.calibration_error import BINS, calibration_gaps, expected_calibration_error
from dtrain.models.loss import target_losses
from dtrain.objectives.base import LossOutput, Objective

GAPS = tuple(f"gap_{number}" for number in range(BINS))


class CausalLm(Objective):
    """Cross-entropy of the targets; an item is a target.

    A held-out set with `calibration` measures the expected calibration error in the same pass.
    """

    def __init__(self, settings: Stage | EvaluationSet) -> None:
        super().__init__(settings)
        # A held-out loss is measured without smoothing, so that it compares between runs.
        self.smoothing = settings.train.label_smoothing if isinstance(settings, Stage) else 0.0
        if isinstance(settings, EvaluationSet) and settings.calibration:
            self.metric_sum_names = GAPS

    def weight(self, counts: BatchCounts) -> int:
        return counts.supervised_tokens

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        if self.metric_sum_names:
            losses, gaps = calibration_gaps(model, batch)
            sums = dict(zip(GAPS, gaps, strict=True))
            return LossOutput(losses.sum(), len(batch.targets), losses, sums)
        total, losses = target_losses(model, batch, self.smoothing, batch.target_weights)
        return LossOutput(total, len(batch.targets), losses)

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float]:
        if not sums:
            return {}
        return {"ece": expected_calibration_error(list(sums.values()), weight)}

    def item_positions(self, batch: MicroBatch) -> NDArray[np.int64]:
        return batch.target_positions.numpy()


class ContinuedPretraining(CausalLm):
    """Every token of a text is a target; texts are cut where a sequence is full."""

    dataset = DatasetSpec("cpt", FullTextEncoder, Packing.STREAM)


class SupervisedFinetuning(CausalLm):
    """The tokens of answers are targets; a conversation stays in one sequence."""

    dataset = DatasetSpec("sft", AnswerEncoder, Packing.WHOLE)
