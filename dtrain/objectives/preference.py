"""Preference objectives on pairs: DPO and its losses, SimPO, CPO, ORPO.

An item is a pair: the chosen and the rejected answer to one prompt, two documents of one sequence.
Letters: D documents of a micro-batch, P pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dtrain.data.loader import MicroBatch
from dtrain.data.packing import Packing
from dtrain.data.preference_encoders import CHOSEN, REJECTED, PairEncoder
from dtrain.data.prepare import DatasetSpec
from dtrain.objectives.answers import (
    AnswerLogProbs,
    AnswerObjective,
    answer_log_probs,
    documents_labeled,
)
from dtrain.objectives.base import LossOutput


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of the answers of P pairs, each float32 [P].

    Attributes:
        chosen, rejected: sums over an answer's tokens, with a gradient.
        chosen_tokens, rejected_tokens: numbers of those tokens.
        reference_chosen, reference_rejected: the same sums by the reference; zeros without one.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def chosen_mean(self) -> Tensor:
        """Log-probability per token of the chosen answers."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """Log-probability per token of the rejected answers."""
        return self.rejected / self.rejected_tokens

    def log_ratios(self, *, per_token: bool = False) -> tuple[Tensor, Tensor]:
        """log(model / reference) of the chosen and of the rejected answers."""
        chosen = self.chosen - self.reference_chosen
        rejected = self.rejected - self.reference_rejected
        if per_token:
            return chosen / self.chosen_tokens, rejected / self.rejected_tokens
        return chosen, rejected


MIN_SURPRISE = 1e-7  # of an answer's token, in nats, so that its odds are finite
METRICS = (
    "rewards_chosen", "rewards_rejected", "accuracy", "likelier", "log_probs_chosen",
    "log_probs_rejected",
)  # fmt: skip


class PairObjective(AnswerObjective):
    """An objective on pairs: `pair_losses` and `rewards` are all that differs."""

    metric_sum_names = METRICS

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        reference = self.reference(model, batch) if self.needs_reference else None
        answers = answer_log_probs(model, batch)
        pairs = pair_up(answers, reference, batch)
        losses = self.pair_losses(pairs)
        # Without pairs, the sum over no token still reaches the parameters.
        total = losses.sum() + 0.0 * answers.sums.sum()
        return LossOutput(total, losses.numel(), losses.detach(), self._metric_sums(pairs))

    def item_positions(self, batch: MicroBatch) -> NDArray[np.int64]:
        return batch.document_starts[documents_labeled(batch, CHOSEN).cpu().numpy()]

    @abstractmethod
    def pair_losses(self, pairs: Pairs) -> Tensor:
        """The loss of each pair, float32 [P]."""

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What the objective compares: the implicit reward of each answer, [P] each."""
        chosen, rejected = pairs.log_ratios()
        return self.beta * chosen, self.beta * rejected

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float]:
        means = {name: total / weight for name, total in sums.items()}
        means["reward_margin"] = means["rewards_chosen"] - means["rewards_rejected"]
        return means

    @torch.no_grad()
    def _metric_sums(self, pairs: Pairs) -> dict[str, Tensor]:
        chosen, rejected = self.rewards(pairs)
        return {
            "rewards_chosen": chosen.sum(),
            "rewards_rejected": rejected.sum(),
            "accuracy": (chosen > rejected).float().sum(),
            "likelier": (pairs.chosen_mean > pairs.rejected_mean).float().sum(),
            "log_probs_chosen": pairs.chosen.sum(),
            "log_probs_rejected": pairs.rejected.sum(),
        }


def pair_up(answers: AnswerLogProbs, reference: Tensor | None, batch: MicroBatch) -> Pairs:
    """The documents of a micro-batch as pairs; a chosen answer stands before its rejected one."""
    chosen, rejected = documents_labeled(batch, CHOSEN), documents_labeled(batch, REJECTED)
    base = torch.zeros_like(answers.sums.detach()) if reference is None else reference
    return Pairs(
        answers.sums[chosen],
        answers.sums[rejected],
        answers.tokens[chosen],
        answers.tokens[rejected],
        base[chosen],
        base[rejected],
    )


class Dpo(PairObjective):
    """Direct preference optimization (arXiv:2305.18290), against the base of the stage."""

    dataset = DatasetSpec("dpo", PairEncoder, Packing.WHOLE)
    needs_reference = True

    def pair_losses(self, pairs: Pairs) -> Tensor:
        losses = self._comparison(pairs)
        if weight := self.preference.sft_weight or 0.0:
            losses = losses - weight * pairs.chosen_mean
        return losses

    def _comparison(self, pairs: Pairs) -> Tensor:
        kind, noise = self.preference.loss, self.preference.label_smoothing
        # The authors of IPO confirm that their results divide by the answer's length.
        per_token = self.preference.length_normalized or kind == "ipo"
        chosen, rejected = pairs.log_ratios(per_token=per_token)
        margin = self.beta * (chosen - rejected)
        if kind == "sigmoid":
            return -(1 - noise) * logsigmoid(margin) - noise * logsigmoid(-margin)
        if kind == "robust":
            clean, flipped = -(1 - noise) * logsigmoid(margin), -noise * logsigmoid(-margin)
            return (clean - flipped) / (1 - 2 * noise)
        if kind == "hinge":
            return torch.relu(1 - margin)
        if kind == "ipo":
            return (chosen - rejected - 1 / (2 * self.beta)) ** 2
        if kind == "apo_zero":
            return 1 - torch.sigmoid(self.beta * chosen) + torch.sigmoid(self.beta * rejected)
        return torch.sigmoid(self.beta * chosen) + 1 - torch.sigmoid(margin)  # apo_down


class SimPo(PairObjective):
    """Simple preference optimization (arXiv:2405.14734): log-probabilities per token."""

    dataset = DatasetSpec("simpo", PairEncoder, Packing.WHOLE)
    default_beta = 2.0

    def pair_losses(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return -logsigmoid(chosen - rejected - self.preference.target_margin)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return self.beta * pairs.chosen_mean, self.beta * pairs.rejected_mean


class Cpo(PairObjective):
    """Contrastive preference optimization (arXiv:2401.08417): DPO with a uniform reference, and
    cross-entropy of the chosen answer."""

    dataset = DatasetSpec("cpo", PairEncoder, Packing.WHOLE)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        weight = self.preference.sft_weight
        margin = self.beta * (pairs.chosen - pairs.rejected)
        return -logsigmoid(margin) - (1.0 if weight is None else weight) * pairs.chosen_mean


class Orpo(PairObjective):
    """Odds ratio preference optimization (arXiv:2403.07691); `beta` is its weight lambda."""

    dataset = DatasetSpec("orpo", PairEncoder, Packing.WHOLE)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
        log_odds = (chosen - rejected) - (log_complement(chosen) - log_complement(rejected))
        return -chosen - self.beta * logsigmoid(log_odds)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return self.beta * pairs.chosen_mean, self.beta * pairs.rejected_mean


def log_complement(log_probs: Tensor) -> Tensor:
    """log(1 - p) of log-probabilities of p; finite where p rounds to 1."""
    return torch.log(-torch.expm1(log_probs.clamp(max=-MIN_SURPRISE)))
