"""Kahneman-Tversky optimization (arXiv:2402.01306): answers that are rated one by one.

An item is a rated answer. The loss compares its log-ratio against the reference with a baseline,
the mean log-ratio of unrelated answers over the global batch, so that neither the number of ranks
nor the micro-batch size changes it. Letters: D documents of a micro-batch, I items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtrain.data.check_rows import one_label_error
from dtrain.data.loader import MicroBatch
from dtrain.data.packed_dataset import PackedDataset
from dtrain.data.packing import Packing
from dtrain.data.preference_encoders import CHOSEN, REJECTED, UNRELATED, RatedAnswerEncoder
from dtrain.data.prepare import DatasetSpec
from dtrain.data.tokenize import DESIRABLE, UNDESIRABLE
from dtrain.distributed.world import World
from dtrain.models.dropout import set_dropout_key
from dtrain.objectives.answers import (
    AnswerObjective,
    answer_log_probs,
    documents_labeled,
    select_documents,
)
from dtrain.objectives.base import LossOutput


class Kto(AnswerObjective):
    """KTO against the base of the stage."""

    dataset = DatasetSpec("kto", RatedAnswerEncoder, Packing.WHOLE)
    needs_reference = True
    metric_sum_names = (
        "rewards_chosen", "rewards_rejected", "chosen", "rejected", "baseline",
    )  # fmt: skip

    def check_data(self, dataset: PackedDataset) -> None:
        counts = sum((Counter(s.store.manifest["counts"]) for s in dataset.sources), Counter[str]())
        if not (counts[DESIRABLE] and counts[UNDESIRABLE]):
            answers = counts[DESIRABLE] + counts[UNDESIRABLE]
            where = ", ".join(dataset.names)
            raise one_label_error(bool(counts[DESIRABLE]), answers, where=where)

    @torch.no_grad()
    def begin_step(self, model: nn.Module, batches: Iterable[MicroBatch], world: World) -> float:
        """The mean log-ratio of unrelated answers over the global batch, at least 0."""
        set_dropout_key(model, 0, 0, [], [])  # the baseline is an estimate without dropout
        total = count = 0.0
        for batch in batches:
            batch = batch.to(world.device)
            unrelated = documents_labeled(batch, UNRELATED)
            reference = self.reference(model, batch, unrelated)
            answers = answer_log_probs(model, select_documents(batch, unrelated))
            ratios = (answers.sums - reference)[: len(unrelated)]  # of none on a rank without rows
            total, count = total + float(ratios.double().sum()), count + len(unrelated)
        total, count = world.sum([total, count])
        return max(0.0, total / max(1, count))

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        baseline: float = statistics
        reference = self.reference(model, batch)  # first: engines expect forward, backward
        answers = answer_log_probs(model, batch)
        rewards = self.beta * (answers.sums - reference)
        desirable = documents_labeled(batch, CHOSEN)
        undesirable = documents_labeled(batch, REJECTED)
        items = documents_labeled(batch, CHOSEN, REJECTED)
        losses = self.answer_losses(rewards, baseline, batch)
        sums = {
            "rewards_chosen": rewards[desirable].detach().sum(),
            "rewards_rejected": rewards[undesirable].detach().sum(),
            "chosen": torch.tensor(float(len(desirable))),
            "rejected": torch.tensor(float(len(undesirable))),
            "baseline": torch.tensor(baseline * len(items)),
        }
        # Without items, the sum over no token still reaches the parameters.
        total = losses[items].sum() + 0.0 * answers.sums.sum()
        return LossOutput(total, len(items), losses[items].detach(), sums)

    def answer_losses(self, rewards: Tensor, baseline: float, batch: MicroBatch) -> Tensor:
        """The loss of each document, float32 [D]: 1 - value, and 0 of unrelated answers."""
        weights = np.array([0.0, 0.0, 0.0])
        weights[CHOSEN] = self.preference.desirable_weight
        weights[REJECTED] = self.preference.undesirable_weight
        signs = torch.from_numpy(np.where(batch.labels == CHOSEN, -1.0, 1.0)).to(rewards)
        weight = torch.from_numpy(weights[batch.labels]).to(rewards)
        return weight * torch.sigmoid(signs * (rewards - self.beta * baseline))

    def item_positions(self, batch: MicroBatch) -> NDArray[np.int64]:
        return batch.document_starts[documents_labeled(batch, CHOSEN, REJECTED).cpu().numpy()]

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float]:
        chosen = sums["rewards_chosen"] / max(1.0, sums["chosen"])
        rejected = sums["rewards_rejected"] / max(1.0, sums["rejected"])
        return {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "reward_margin": chosen - rejected,
            "baseline": sums["baseline"] / weight,
        }
