"""Log-probabilities of the answers of a micro-batch, by the model and by its reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dtrain.config.schema import EvaluationSet, Stage
from dtrain.data.loader import MicroBatch
from dtrain.data.packed_dataset import BatchCounts
from dtrain.models.loss import target_losses, target_token_losses
from dtrain.objectives.base import Objective, StageContext, adapters_disabled
from dtrain.objectives.stored_values import StoredValues


@dataclass(frozen=True)
class AnswerLogProbs:
    """Log-probabilities of D documents.

    Attributes:
        sums: over each document's targets, float32 [D].
        tokens: numbers of targets, float32 [D], at least 1.
    """

    sums: Tensor
    tokens: Tensor


def answer_log_probs(model: nn.Module, batch: MicroBatch) -> AnswerLogProbs:
    """Compute the log-probability of each document's answer, with a gradient."""
    index = document_of_targets(batch)
    losses = target_token_losses(model, batch)
    tokens = _sums(torch.ones_like(losses), index, batch)
    return AnswerLogProbs(_sums(-losses, index, batch), tokens.clamp(min=1))


class AnswerObjective(Objective):
    """Base of the objectives that compare or rate answers.

    Attributes:
        needs_reference: the loss compares with the model that the stage started from.
        default_beta: where the recipe names none.
    """

    needs_reference: ClassVar[bool] = False
    default_beta: ClassVar[float] = 0.1

    def __init__(self, settings: Stage | EvaluationSet) -> None:
        super().__init__(settings)
        self.preference = settings.preference
        beta = self.preference.beta
        self.beta = self.default_beta if beta is None else beta

    def weight(self, counts: BatchCounts) -> int:
        return counts.examples

    def begin_stage(self, context: StageContext) -> None:
        stores = self.preference.precompute_reference or not context.base_when_disabled
        if self.needs_reference and stores:
            folder = context.cache / "reference"
            self.stored = StoredValues(
                folder, context.start, context.loader, context.world, per="document"
            )

    def start_values(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        return {"log_probs": _log_probs(model, batch)}

    def reference(
        self, model: nn.Module, batch: MicroBatch, documents: Tensor | None = None
    ) -> Tensor:
        """Log-probability of each document's answer by the model that the stage started from, [D].

        Args:
            model: as wrapped by the engine.
            batch: on the model's device.
            documents: only of these, if there are any on this rank.
        """
        if self.stored is not None:
            values = self.stored.read(batch)["log_probs"]
            return values if documents is None or not len(documents) else values[documents]
        if documents is not None:
            batch = select_documents(batch, documents)
        with adapters_disabled(model):
            return _log_probs(model, batch)


@torch.no_grad()
def _log_probs(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Log-probability of each document's answer, float32 [D]."""
    _, losses = target_losses(model, batch)
    return _sums(-losses, document_of_targets(batch), batch)


def documents_labeled(batch: MicroBatch, *labels: int) -> Tensor:
    """Indices of the documents of a micro-batch with these labels; none on a rank without rows."""
    keep = np.isin(batch.labels, labels) & bool(batch.targets.numel())
    return torch.from_numpy(np.flatnonzero(keep)).to(batch.targets.device)


def select_documents(batch: MicroBatch, documents: Tensor) -> MicroBatch:
    """The micro-batch with only some of its documents; all of it if that leaves none.

    Args:
        batch: of which sequences and their ids are dropped, as they are no longer whole.
        documents: indices, rising.
    """
    if not len(documents):
        return batch
    keep = torch.zeros(len(batch.document_lengths), dtype=torch.bool)
    keep[documents.cpu()] = True
    kept_tokens = keep.repeat_interleave(torch.tensor(batch.document_lengths))
    kept_tokens = kept_tokens.to(batch.input_ids.device)
    kept_targets = kept_tokens[batch.target_positions]
    indices = documents.tolist()
    positions = None if batch.position_ids is None else batch.position_ids[:, kept_tokens]
    lengths = [batch.document_lengths[index] for index in indices]
    return replace(
        batch,
        input_ids=batch.input_ids[:, kept_tokens],
        position_ids=positions,
        target_positions=(kept_tokens.cumsum(0) - 1)[batch.target_positions[kept_targets]],
        targets=batch.targets[kept_targets],
        document_lengths=lengths,
        sequences=[],
        sequence_lengths=[],
        sequence_ids=[],
        document_ids=batch.document_ids[indices],
        labels=batch.labels[indices],
    )


def document_of_targets(batch: MicroBatch) -> Tensor:
    """Which document each target is in, int64 [K]."""
    ends = torch.tensor(batch.document_lengths).cumsum(0).to(batch.target_positions.device)
    return torch.searchsorted(ends, batch.target_positions, right=True)


def _sums(values: Tensor, index: Tensor, batch: MicroBatch) -> Tensor:
    zeros = values.new_zeros(len(batch.document_lengths))
    return zeros.index_add(0, index, values)
