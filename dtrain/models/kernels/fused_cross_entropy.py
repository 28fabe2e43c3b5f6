"""The output matrix and the loss in one, a few tokens at a time.

Logits of a large vocabulary are the largest tensor of a step. Here each chunk of them lives only
until its loss and its gradient are known, as in Liger (arXiv:2410.10989): backward has nothing left
to do but to scale. Letters: K supervised tokens, h width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from dtrain.models.kernels import native
from dtrain.models.kernels.compiled import compile_on_gpu
from dtrain.models.kernels.matmul import times, times_transposed
from dtrain.models.kernels.output_probe import Adjust
from dtrain.planning.activations import chunk_rows

_PLACE = "_dtrain_head"


class FusedLossHead:
    """A model's output layer that gives the loss instead of logits, while it has targets."""

    def __init__(self, model: nn.Module, head: nn.Linear, adjust: Adjust | None = None) -> None:
        """Replace the forward of `head`.

        Args:
            adjust: what the model does to the logits [c, V] afterwards.
        """
        self._model, self._head, self._adjust = model, head, adjust
        self._targets: Tensor | None = None
        self.losses: Tensor | None = None  # of each target [K], of the last call; no gradient
        head.forward = self._forward  # type: ignore[assignment]
        setattr(model, _PLACE, self)

    @staticmethod
    def of(model: nn.Module) -> FusedLossHead | None:
        """The one that was put into a model."""
        found: FusedLossHead | None = getattr(model, _PLACE, None)
        return found

    @contextmanager
    def learning(self, targets: Tensor) -> Iterator[None]:
        """Give the loss of targets [K] at the K tokens that the model keeps, as [1, 1, 1]."""
        self._targets = targets
        with ExitStack() as stack:
            stack.callback(setattr, self, "_targets", None)
            if self._adjust is not None:
                self._pass_around(stack)
            yield

    def _pass_around(self, stack: ExitStack) -> None:
        """Take the loss past what the model does to logits, which it has been through already."""
        passed: list[Tensor] = []

        def give(_: nn.Module, args: Any, output: Any) -> Any:
            output.logits = passed.pop()
            return output

        # The head's loss as engines leave it, and before they see the model's output.
        caught = self._head.register_forward_hook(lambda *call: passed.append(call[-1]))
        stack.callback(caught.remove)
        stack.callback(self._model.register_forward_hook(give, prepend=True).remove)

    def _forward(self, hidden: Tensor) -> Tensor:
        weight, bias = self._head.weight, self._head.bias
        if self._targets is None:
            return linear(hidden, weight, bias)
        hidden = hidden.flatten(0, -2)
        loss, self.losses = head_loss(hidden, weight, bias, self._targets, self._adjust)
        return loss.view(1, 1, 1)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    adjust: Adjust | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `hidden @ weight.T + bias` and targets, float32.

    Args:
        hidden: [K, h].
        weight: [V, h].
        bias: [V].
        targets: int64 [K].
        adjust: of the logits [c, V] of c rows, before the softmax.

    Returns:
        Their sum, and the loss of each [K], which has no gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, losses = _HeadLoss.apply(hidden, weight, bias, targets, adjust)
    return loss, losses


class _HeadLoss(torch.autograd.Function):
    """With e = exp(logit - max) and s its sum: dlogit = e / s - 1 at the target."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        adjust: Adjust | None,
    ) -> tuple[Tensor, Tensor]:
        wants = ctx.needs_input_grad[:3]
        matrix = weight.to(hidden.dtype)
        gradients = [
            torch.zeros_like(t) if want and t is not None else None
            for want, t in zip(wants, (hidden, weight, bias), strict=True)
        ]
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for part in _chunks(len(targets), chunk_rows(weight.shape[0])):
            # without a name, which would hold one chunk while the next is made
            _chunk(
                times_transposed(hidden[part], matrix),
                losses[part], hidden, matrix, bias, targets, part, gradients, adjust,
            )  # fmt: skip
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.wants = wants
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        known = iter(ctx.saved_tensors)
        scaled = (next(known) * gradient if want else None for want in ctx.wants)
        return *scaled, None, None


def _chunks(targets: int, rows: int) -> Iterator[slice]:
    """Ranges of that many rows; a single row left over, for which GPUs compile again, joins one."""
    starts = list(range(0, targets, rows))
    if len(starts) > 1 and targets - starts[-1] == 1:
        starts.pop()
    return map(slice, starts, [*starts[1:], targets])


def _chunk(
    logits: Tensor,
    losses: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    part: slice,
    gradients: list[Tensor | None],
    adjust: Adjust | None,
) -> None:
    """Losses [c] of a chunk's logits [c, V], which it spends; adds its part of the gradients."""
    logits = logits.float()
    if bias is not None:
        logits += bias
    learns = any(g is not None for g in gradients)
    if adjust is None:
        cross_entropy_inplace(logits, losses, targets[part], learns=learns)
    else:
        logits = _spend_adjusted(logits, losses, targets[part], adjust, learns=learns)
    if learns:
        _add_gradients(logits.to(hidden.dtype), hidden[part], matrix, part, gradients)


def _spend_adjusted(
    logits: Tensor, losses: Tensor, targets: Tensor, adjust: Adjust, *, learns: bool
) -> Tensor:
    """As `_spend`, of adjusted logits; return the gradient of those that were given."""
    with torch.set_grad_enabled(learns):
        adjusted = adjust(logits.requires_grad_(learns))
    spent = adjusted.detach()
    cross_entropy_inplace(spent, losses, targets, learns=learns)
    return torch.autograd.grad(adjusted, logits, spent)[0] if learns else spent


def cross_entropy_inplace(logits: Tensor, losses: Tensor, targets: Tensor, *, learns: bool) -> None:
    """Fill in losses [c] of logits [c, V], which become their own gradient if it is needed."""
    rows, width = logits.shape
    if native.fits_flat(logits, losses) and bool(((targets >= 0) & (targets < width)).all()):
        native.call("cross_entropy", logits, targets, losses, rows, width)
    else:
        _spend_by_torch(logits, losses, targets, learns)


@compile_on_gpu
def _spend_by_torch(logits: Tensor, losses: Tensor, targets: Tensor, learns: bool) -> None:
    places = targets.unsqueeze(1)
    wanted = logits.gather(1, places)
    greatest = logits.amax(1, keepdim=True)
    logits.sub_(greatest).exp_()
    total = logits.sum(1, keepdim=True)
    torch.sub(total.log() + greatest, wanted, out=losses.unsqueeze(1))
    if learns:
        logits.div_(total).scatter_add_(1, places, torch.full_like(wanted, -1.0))


def _add_gradients(
    dlogits: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    part: slice,
    gradients: list[Tensor | None],
) -> None:
    dhidden, dweight, dbias = gradients
    if dhidden is not None:
        dhidden[part] = times(dlogits, matrix)
    if dweight is not None:
        dweight += (dlogits.t() @ hidden).to(dweight.dtype)
    if dbias is not None:
        dbias += dlogits.sum(0)
