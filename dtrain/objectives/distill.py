"""Distillation (arXiv:1503.02531): answers' tokens learn the probabilities of a teacher.

An item is a target. Its loss is (1 - w) t² D + w C, with the divergence D from the
teacher at temperature t, the cross-entropy C of the row's own token, and w = `ce_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from dtrain.config.schema import EvaluationSet, Stage
from dtrain.data.loader import MicroBatch
from dtrain.data.packing import Packing
from dtrain.data.prepare import DatasetSpec
from dtrain.data.tokenize import AnswerEncoder
from dtrain.models.divergence import (
    DivergenceFn,
    TokenDivergence,
    distillation_losses,
    divergence_from,
    divergence_from_top_k,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    teacher_logits,
    teacher_top_k,
)
from dtrain.models.loss import transformers_model
from dtrain.objectives.base import LossOutput, StageContext, adapters_disabled
from dtrain.objectives.causal_lm import CausalLm
from dtrain.objectives.stored_values import StoredValues


class Distillation(CausalLm):
    """A divergence from a teacher, which is another model or the one that the stage started from.

    Attributes:
        teacher: frozen; None for the model itself without its adapter, and with stored values.
    """

    dataset = DatasetSpec("distill", AnswerEncoder, Packing.WHOLE)
    metric_sum_names = ("divergence", "cross_entropy")
    teacher: nn.Module | None = None

    def __init__(self, settings: Stage | EvaluationSet) -> None:
        super().__init__(settings)
        assert settings.distill is not None
        self.distill = settings.distill

    def begin_stage(self, context: StageContext) -> None:
        self.frozen, address = context.frozen, self.distill.teacher_folder
        if self.distill.top_k is None:
            self.teacher = None if address is None else context.frozen.load(address)
            return
        inputs: Mapping[str, Any] = context.start
        if address is not None:
            inputs = {
                "teacher": context.frozen.fingerprint(address),
                "dtype": context.start["dtype"],
            }
        folder, inputs = context.cache / "teacher", {**inputs, "top_k": self.distill.top_k}
        self.stored = StoredValues(folder, inputs, context.loader, context.world, per="target")

    def start_values(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        address, count = self.distill.teacher_folder, self.distill.top_k
        assert count is not None
        teacher = model if address is None else self.frozen.load(address)
        vocabulary = transformers_model(model).config.get_text_config().vocab_size
        log_probs, tokens = teacher_top_k(teacher, batch, count, vocabulary)
        return {"log_probs": log_probs, "tokens": tokens}

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        weight, temperature = self.distill.ce_weight, self.distill.temperature
        found = distillation_losses(
            model,
            batch,
            self.divergence(model, batch),  # first: engines expect forward, backward
            divergence_weight=(1 - weight) * temperature**2,
            ce_weight=weight,
        )
        sums = {
            "divergence": found.divergences.sum(),
            "cross_entropy": found.cross_entropies.sum(),
        }
        return LossOutput(found.total, len(batch.targets), found.losses, sums)

    def divergence(self, model: nn.Module, batch: MicroBatch) -> TokenDivergence:
        """The divergence from the teacher, which computes the micro-batch here if need be."""
        if self.stored is not None:
            values = self.stored.read(batch)
            return divergence_from_top_k(
                values["log_probs"], values["tokens"], self.distill.temperature
            )
        teacher = model if self.teacher is None else self.teacher
        with adapters_disabled(model) if self.teacher is None else nullcontext():
            logits = teacher_logits(teacher, batch)
        return divergence_from(logits, self.divergence_fn(), self.distill.temperature)

    def divergence_fn(self) -> DivergenceFn:
        """The divergence that the recipe names."""
        if self.distill.loss == "jsd":
            return jensen_shannon(self.distill.beta)
        return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[self.distill.loss]

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float]:
        return {name: total / weight for name, total in sums.items()}
