"""Divergence of a model from a teacher at the target tokens of a packed micro-batch.

As in the cross-entropy, the output layers of both models are applied to a few tokens at a time, so
neither model's logits are ever whole. Letters: K targets, c tokens of a chunk, V vocabulary; p and
q probabilities of the teacher and of the model that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, log1p

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from dtrain.models.kernels.fused_cross_entropy import (
    ChunkLoss,
    FusedLossHead,
    chunked_head_loss,
    in_autocast_dtype,
    logit_chunk,
)
from dtrain.models.kernels.output_probe import LogitTransform
from dtrain.models.loss import (
    PackedInputs,
    PackedTargets,
    head_output,
    target_logits,
    transformers_model,
)

TeacherLogits = Callable[[slice], Tensor]
"""Some of the K targets → the teacher's logits there, float32 [c, V]."""
DivergenceFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log p, log q) [c, V] each → the divergence of each token [c], and its gradient by the logits
that q is the softmax of [c, V]."""
TokenDivergence = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(the model's logits [c, V], their tokens) → divergence [c] and its gradient by those logits."""


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q), which covers all that the teacher may say (arXiv:1503.02531)."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(1), log_q.exp() - p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p), which avoids what the teacher would not say (arXiv:2306.08543)."""
    q, ratio = log_q.exp(), log_q - log_p
    losses = (q * ratio).sum(1)
    return losses, q * (ratio - losses.unsqueeze(1))


def jensen_shannon(beta: float) -> DivergenceFn:
    """The generalized divergence beta KL(p || m) + (1 - beta) KL(q || m), where
    m = beta p + (1 - beta) q (arXiv:2306.13649)."""

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.logaddexp(log_p + log(beta), log_q + log1p(-beta))
        of_teacher = (log_p.exp() * (log_p - log_m)).sum(1)
        q, ratio = log_q.exp(), log_q - log_m
        of_model = (q * ratio).sum(1)
        gradient = (1 - beta) * q * (ratio - of_model.unsqueeze(1))
        return beta * of_teacher + (1 - beta) * of_model, gradient

    return divergence


def divergence_from(
    teacher: TeacherLogits, divergence: DivergenceFn, temperature: float = 1.0
) -> TokenDivergence:
    """The divergence from a teacher, with the logits of both divided by a temperature.

    Models may pad their vocabularies to different sizes: the first tokens, which both have, count.
    """

    def of_tokens(logits: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        others = teacher(tokens)
        width = min(logits.shape[1], others.shape[1])
        log_p = log_softmax(others[:, :width] / temperature, 1)
        del others  # as large as the logits
        log_q = log_softmax(logits[:, :width] / temperature, 1)
        losses, gradient = divergence(log_p, log_q)
        gradient = gradient / temperature
        if width < logits.shape[1]:
            gradient = pad(gradient, (0, logits.shape[1] - width))
        return losses, gradient

    return of_tokens


@torch.no_grad()
def teacher_logits(teacher: nn.Module, micro_batch: PackedInputs) -> TeacherLogits:
    """Compute what a teacher's logits at the targets of a micro-batch follow from.

    Args:
        teacher: whose output matrix can be read during the loss; the model itself, without its
            adapters, is such a teacher.
        micro_batch: as for `target_logits`.
    """
    head = FusedLossHead.of(transformers_model(teacher))
    if head is None:
        whole = target_logits(teacher, micro_batch).float()
        return lambda tokens: whole[tokens]
    states = head_output(teacher, micro_batch, lambda hidden, *_: in_autocast_dtype(hidden))

    @torch.no_grad()
    def logits(tokens: slice) -> Tensor:
        matrix = head.base_layer.weight.to(states.dtype)
        chunk = logit_chunk(states[tokens], matrix, head.base_layer.bias)
        return chunk if head.transform is None else head.transform(chunk)

    return logits


def divergence_from_top_k(
    log_probs: Tensor, tokens: Tensor, temperature: float = 1.0
) -> TokenDivergence:
    """The forward KL from a teacher of which only the likeliest tokens are known.

    Their probabilities, at the temperature, are scaled to add up to 1; those of others count as 0.

    Args:
        log_probs: of these tokens, at temperature 1, float32 [K, k].
        tokens: the k likeliest of each target, integers [K, k].
    """

    def of_tokens(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        log_p, indices = log_softmax(log_probs[chunk] / temperature, 1), tokens[chunk].long()
        log_q, p = log_softmax(logits / temperature, 1), log_p.exp()
        losses = (p * (log_p - log_q.gather(1, indices))).sum(1)
        return losses, log_q.exp_().scatter_add_(1, indices, -p) / temperature

    return of_tokens


@torch.no_grad()
def teacher_top_k(
    teacher: nn.Module, micro_batch: PackedTargets, k: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of a teacher at each target, at most all of the vocabulary.

    Args:
        vocabulary: tokens of the model that trains; the teacher may pad its own more.

    Returns:
        Their log-probabilities, float32 [K, k], descending, and the tokens, int32 [K, k].
    """
    count, device = len(micro_batch.targets), micro_batch.targets.device
    k = min(k, vocabulary, transformers_model(teacher).config.get_text_config().vocab_size)
    log_probs = torch.empty(count, k, device=device)
    tokens = torch.empty(count, k, dtype=torch.int32, device=device)

    def keep(logits: Tensor, chunk: slice, needs_gradient: bool) -> Tensor:
        found = log_softmax(logits[:, :vocabulary], 1).topk(k)
        log_probs[chunk], tokens[chunk] = found.values, found.indices.int()
        return logits

    sum_of_chunks(teacher, micro_batch, torch.zeros(count, device=device), keep)
    return log_probs, tokens


@dataclass(frozen=True)
class DistillationLosses:
    """Losses of the K targets of a micro-batch.

    Attributes:
        total: their sum, with a gradient.
        losses, divergences, cross_entropies: float32 [K], without a gradient.
    """

    total: Tensor
    losses: Tensor
    divergences: Tensor
    cross_entropies: Tensor


def distillation_losses(
    model: nn.Module,
    micro_batch: PackedTargets,
    divergence: TokenDivergence,
    *,
    divergence_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> DistillationLosses:
    """Compute divergence_weight · divergence + ce_weight · cross-entropy of the targets.

    Args:
        model: wrapped by an engine or not.
        micro_batch: as for `target_losses`.
    """
    targets = micro_batch.targets
    result = torch.empty(3, len(targets), dtype=torch.float32, device=targets.device)
    losses, divergences, cross_entropies = result

    @torch.no_grad()
    def chunk_loss(logits: Tensor, chunk: slice, needs_gradient: bool) -> Tensor:
        divergences[chunk], gradient = divergence(logits, chunk)
        log_probs, indices = log_softmax(logits, 1), targets[chunk].unsqueeze(1)
        cross_entropies[chunk] = -log_probs.gather(1, indices).squeeze(1)
        losses[chunk] = divergence_weight * divergences[chunk] + ce_weight * cross_entropies[chunk]
        gradient = divergence_weight * gradient
        if needs_gradient and ce_weight:
            gradient += ce_weight * log_probs.exp()
            gradient.scatter_add_(1, indices, gradient.new_full(indices.shape, -ce_weight))
        return gradient

    total = sum_of_chunks(model, micro_batch, losses, chunk_loss)
    return DistillationLosses(total, losses, divergences, cross_entropies)


def sum_of_chunks(
    model: nn.Module,
    micro_batch: PackedTargets,
    losses: Tensor,
    chunk_loss: ChunkLoss,
) -> Tensor:
    """The sum of the losses [K] that `chunk_loss` writes, with a gradient."""
    if FusedLossHead.of(transformers_model(model)) is None:
        return _sum_of_logits(target_logits(model, micro_batch), losses, chunk_loss)

    def compute(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform | None
    ) -> Tensor:
        total = chunked_head_loss(hidden, weight, bias, transform, losses, chunk_loss)
        return total.view(1, 1)

    return head_output(model, micro_batch, compute).squeeze()


def _sum_of_logits(logits: Tensor, losses: Tensor, chunk_loss: ChunkLoss) -> Tensor:
    """As `sum_of_chunks`, of whole logits [K, V]."""
    logits = logits.float()
    gradient = chunk_loss(logits.detach(), slice(0, len(losses)), logits.requires_grad)
    # the first term has the value, the second the gradient
    return losses.sum() + ((logits - logits.detach()) * gradient).sum()


class ObservedDivergence:
    """The divergence at some targets of a forward pass that computes another loss.

    Attributes:
        total: its sum over these targets, with a gradient; set by the forward pass.
    """

    def __init__(self, is_observed: Tensor, divergence: TokenDivergence) -> None:
        """Observe the n targets of `is_observed`, bool [K].

        Args:
            divergence: called with ranges of these n targets.
        """
        self._is_observed, self._divergence = is_observed, divergence
        self._losses = torch.empty(int(is_observed.sum()), device=is_observed.device)
        self.total = torch.zeros((), device=is_observed.device)

    def see_states(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform | None
    ) -> None:
        """Compute it from hidden states, a chunk of logits at a time."""
        states = hidden[self._is_observed]
        self.total = chunked_head_loss(
            states, weight, bias, transform, self._losses, self._chunk_loss
        )

    def see_logits(self, logits: Tensor) -> None:
        """Compute it from logits [K, V]."""
        self.total = _sum_of_logits(logits[self._is_observed], self._losses, self._chunk_loss)

    @torch.no_grad()
    def _chunk_loss(self, logits: Tensor, chunk: slice, needs_gradient: bool) -> Tensor:
        self._losses[chunk], gradient = self._divergence(logits, chunk)
        return gradient
