"""Logits and cross-entropy of the target tokens of a packed micro-batch.

Letters: T tokens of a micro-batch, K targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dtrain.models.attention import Documents, use_document_lengths
from dtrain.models.kernels.fused_cross_entropy import (
    FusedLossHead,
    HeadFunction,
    fused_cross_entropy,
    token_cross_entropy,
)
from dtrain.models.kernels.output_probe import LogitTransform


class PackedInputs(Protocol):
    """The inputs of a micro-batch."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor | None: ...
    @property
    def target_positions(self) -> Tensor: ...
    @property
    def document_lengths(self) -> list[int]: ...


class PackedTargets(PackedInputs, Protocol):
    """The inputs and targets of a micro-batch."""

    @property
    def targets(self) -> Tensor: ...


class TargetObserver(Protocol):
    """Sees what a training pass computes at its K targets, so that a term can be added to its loss
    without another pass."""

    def see_states(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform | None
    ) -> None:
        """Called with the arguments of a `HeadFunction`."""

    def see_logits(self, logits: Tensor) -> None:
        """Called with logits [K, V] by a model whose logits are whole."""


_observer: ContextVar[TargetObserver | None] = ContextVar("target_observer", default=None)


@contextmanager
def observing_targets(observer: TargetObserver) -> Iterator[None]:
    """Let an observer see the enclosed forward passes that have a gradient."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def _current_observer() -> TargetObserver | None:
    return _observer.get() if torch.is_grad_enabled() else None


def target_logits(model: nn.Module, micro_batch: PackedInputs) -> Tensor:
    """Compute logits [K, V] at the positions whose next token is a target.

    The output matrix, the largest matrix of a small model, is applied at those positions only.

    Args:
        model: wrapped by an engine or not.
        micro_batch: input_ids and position_ids [1, T], target_positions [K]; without position ids
            it is a single document, which the model computes by itself.
    """
    inner = transformers_model(model)
    if _takes_positions(inner):
        logits = _call(model, inner, micro_batch, logits_to_keep=micro_batch.target_positions)[0]
    else:
        logits = _call(model, inner, micro_batch)[0, micro_batch.target_positions]
    if observer := _current_observer():
        observer.see_logits(logits)
    return logits


def target_losses(
    model: nn.Module,
    micro_batch: PackedTargets,
    smoothing: float = 0.0,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of the targets of a micro-batch, in float32.

    Args:
        model: wrapped by an engine or not.
        micro_batch: as for `target_logits`, with targets [K].
        smoothing: share of a target's probability that all tokens get evenly, as in
            arXiv:1512.00567.
        factors: float32 [K], of each loss in the sum; None for 1.

    Returns:
        Their sum, and the loss of each [K], without its factor and without a gradient.
    """
    inner, targets = transformers_model(model), micro_batch.targets
    head = FusedLossHead.of(inner)
    if head is None:
        losses = token_losses(target_logits(model, micro_batch), targets, smoothing)
        total = losses.sum() if factors is None or not len(targets) else (losses * factors).sum()
        return total, losses.detach()[: len(targets)]
    item_losses: list[Tensor] = []

    def compute(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform | None
    ) -> Tensor:
        loss, losses = fused_cross_entropy(
            hidden, weight, bias, targets, transform, smoothing, factors
        )
        item_losses.append(losses)
        return loss.view(1, 1)

    return head_output(model, micro_batch, compute).squeeze(), item_losses[0]


def target_token_losses(model: nn.Module, micro_batch: PackedTargets) -> Tensor:
    """Cross entropy of each target of a micro-batch, float32 [K], with a gradient.

    With K = 0 it is empty, but its sum still reaches the parameters.

    Args:
        model: wrapped by an engine or not.
        micro_batch: as for `target_losses`.
    """
    inner, targets = transformers_model(model), micro_batch.targets
    head = FusedLossHead.of(inner)
    if head is None:
        logits = target_logits(model, micro_batch)
        return cross_entropy(logits.float(), targets, reduction="none")

    def compute(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform | None
    ) -> Tensor:
        return token_cross_entropy(hidden, weight, bias, targets, transform).unsqueeze(1)

    return head_output(model, micro_batch, compute).reshape(-1)


def head_output(model: nn.Module, micro_batch: PackedInputs, compute: HeadFunction) -> Tensor:
    """What `compute` returns for the hidden states of the K targets and the output layer.

    Args:
        model: with a `FusedLossHead`, wrapped by an engine or not.
        micro_batch: as for `target_logits`.
    """
    inner = transformers_model(model)
    head = FusedLossHead.of(inner)
    assert head is not None
    observer = _current_observer()

    def observed(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform | None
    ) -> Tensor:
        if observer is not None:
            observer.see_states(hidden, weight, bias, transform)
        return compute(hidden, weight, bias, transform)

    with head.computing(observed):
        output = _call(model, inner, micro_batch, logits_to_keep=micro_batch.target_positions)
    return output[0]


def token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy [K] of logits [K, V] and targets [K], in float32.

    With K = 0 it is a single zero that depends on the parameters, as engines wait for gradients.
    """
    if len(targets) == 0:
        return logits.float().sum().view(1)
    return cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def _call(
    model: nn.Module, inner: PreTrainedModel, micro_batch: PackedInputs, **more: Any
) -> Tensor:
    """The model's logits, or the fused head's output in their place."""
    if micro_batch.position_ids is not None:
        more |= {"position_ids": micro_batch.position_ids, **_flash_arguments(inner, micro_batch)}
    with use_document_lengths(micro_batch.document_lengths):
        output = model(input_ids=micro_batch.input_ids, use_cache=False, **more)
    logits: Tensor = output.logits
    return logits


def _takes_positions(inner: PreTrainedModel) -> bool:
    return "logits_to_keep" in signature(inner.forward).parameters


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of an engine and of an adapter."""
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def _flash_arguments(model: PreTrainedModel, micro_batch: PackedInputs) -> dict[str, Any]:
    if not str(model.config._attn_implementation).startswith("flash_attention"):
        return {}
    documents = Documents(tuple(micro_batch.document_lengths), None)
    return documents.flash_arguments(micro_batch.input_ids.device)
