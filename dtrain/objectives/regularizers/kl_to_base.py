"""The divergence of the model from the one that its stage started from.

The term is the mean over the chosen targets of the global batch of KL(base || model): what the base
says stays likely, as in learning without forgetting (arXiv:1606.09282). The base is the model
without its adapter. Letters: K targets of a micro-batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dtrain.data.loader import MicroBatch
from dtrain.models.divergence import (
    ObservedDivergence,
    divergence_from,
    forward_kl,
    teacher_logits,
)
from dtrain.models.loss import observing_targets
from dtrain.objectives.answers import document_of_targets, select_documents
from dtrain.objectives.base import LossOutput, adapters_disabled, global_weight
from dtrain.objectives.regularizers.base import Regularized


class KlToBaseRegularizer(Regularized):
    """weight · KL(base || model) at the targets of replayed or of all rows."""

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        factor = self.factor(batch)
        if not factor:  # no rank has a row in this step
            output = self.inner.loss(model, batch, statistics)
            return self.add_term(output, output.loss, output.loss.new_zeros(()))
        documents = self.documents(batch)
        is_chosen = torch.isin(document_of_targets(batch), documents)
        part = select_documents(batch, documents) if len(documents) else self.no_rows(batch)
        with adapters_disabled(model):
            base = teacher_logits(model, part)
        observer = ObservedDivergence(is_chosen, divergence_from(base, forward_kl))
        with observing_targets(observer):
            output = self.inner.loss(model, batch, statistics)
        return self.add_term(output, output.loss, factor * observer.total)

    def factor(self, batch: MicroBatch) -> float:
        """What a target's divergence counts in the summed loss of its step; 0 without targets.

        The training step divides the sum by the weight of the objective.
        """
        step, loader = self.step(batch), self.loader
        counts = loader.counts(step)
        if self.regularize.reads_replay:
            counts = loader.counts_by_source(step)[loader.source_names[-1]]
        if not counts.supervised_tokens:
            return 0.0
        weight = global_weight(self.inner, loader, step)
        return self.regularize.weight * weight / counts.supervised_tokens

    def documents(self, batch: MicroBatch) -> Tensor:
        """Indices of the chosen documents of a micro-batch."""
        sources = self.loader.sources_at(self.step(batch), batch, batch.document_starts)
        replay = len(self.loader.source_names) - 1
        chosen = sources == replay if self.regularize.reads_replay else sources >= 0
        return torch.from_numpy(np.flatnonzero(chosen)).to(batch.targets.device)

    def no_rows(self, batch: MicroBatch) -> MicroBatch:
        """A micro-batch without targets: a rank without rows still takes part in every pass."""
        return self.loader.read(np.empty(0, dtype=np.int64)).to(batch.targets.device)
