"""Output layer and cross entropy in one function, a few tokens at a time.

The logits of a large vocabulary are the largest tensor of a step. Here each chunk of them exists
only until its loss and gradient are computed, as in Liger (arXiv:2410.10989); backward only scales.
Letters: K target tokens, h width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from dtrain.models.kernels import matmul, native
from dtrain.models.kernels.compiled import compile_on_gpu
from dtrain.models.kernels.output_probe import LogitTransform
from dtrain.planning.activations import chunk_rows

_ATTRIBUTE = "_dtrain_loss_head"


class FusedLossHead:
    """Makes a model's output layer return the loss instead of logits, while it has targets."""

    def __init__(
        self, model: nn.Module, head: nn.Linear, transform: LogitTransform | None = None
    ) -> None:
        """Replace the forward of `head`.

        Args:
            transform: what the model applies to the logits [c, V] afterwards.
        """
        self._model, self._head, self._transform = model, head, transform
        self._targets: Tensor | None = None
        self._by_token = False
        self.losses: Tensor | None = None  # of each target [K] in the last call, without gradient
        head.forward = self._forward  # type: ignore[assignment]
        setattr(model, _ATTRIBUTE, self)

    @staticmethod
    def of(model: nn.Module) -> FusedLossHead | None:
        """The loss head of a model, if it has one."""
        head: FusedLossHead | None = getattr(model, _ATTRIBUTE, None)
        return head

    @contextmanager
    def computing_loss(self, targets: Tensor, *, by_token: bool = False) -> Iterator[None]:
        """Return the loss of targets [K] at the K tokens whose logits are asked for, [1, 1, 1].

        Args:
            by_token: return the loss of each target instead, [1, K, 1].
        """
        self._targets, self._by_token = targets, by_token
        with ExitStack() as stack:
            stack.callback(setattr, self, "_targets", None)
            if self._transform is not None:
                self._bypass_model(stack)
            yield

    def _bypass_model(self, stack: ExitStack) -> None:
        """Return the loss as the model's logits: the transform has been applied already."""
        losses: list[Tensor] = []

        def set_logits(_: nn.Module, args: Any, output: Any) -> Any:
            output.logits = losses.pop()
            return output

        # engines' own hooks see the head's loss first, and the model's output last
        hook = self._head.register_forward_hook(lambda *call: losses.append(call[-1]))
        stack.callback(hook.remove)
        stack.callback(self._model.register_forward_hook(set_logits, prepend=True).remove)

    def _forward(self, hidden: Tensor) -> Tensor:
        weight, bias = self._head.weight, self._head.bias
        if self._targets is None:
            return linear(hidden, weight, bias)
        hidden = hidden.flatten(0, -2)
        if self._by_token:
            losses = token_cross_entropy(hidden, weight, bias, self._targets, self._transform)
            return losses.view(1, -1, 1)
        loss, self.losses = fused_cross_entropy(
            hidden, weight, bias, self._targets, self._transform
        )
        return loss.view(1, 1, 1)


def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `hidden @ weight.T + bias` against targets, in float32.

    Args:
        hidden: [K, h].
        weight: [V, h].
        bias: [V].
        targets: int64 [K].
        transform: applied to the logits [c, V] of a chunk before the softmax.

    Returns:
        Their sum, and the loss of each [K], which has no gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, losses = _HeadLoss.apply(hidden, weight, bias, targets, transform)
    return loss, losses


def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform | None = None,
) -> Tensor:
    """As `fused_cross_entropy`, but the loss of each target [K], with a gradient.

    A frozen output matrix is read once: the gradient of each hidden state is kept, and scaled in
    the backward pass. One that trains is read again in the backward pass.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        losses: Tensor = _TokenLosses.apply(hidden, weight, bias, targets, transform)
    return losses


class _TokenLosses(torch.autograd.Function):
    """The losses of `_HeadLoss`, whose gradients are scaled token by token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform | None,
    ) -> Tensor:
        ctx.wants, ctx.transform = ctx.needs_input_grad[:3], transform
        ctx.head_trains = any(ctx.wants[1:])
        dhidden = torch.zeros_like(hidden) if ctx.wants[0] and not ctx.head_trains else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        matrix = weight.to(hidden.dtype)
        for chunk in _chunks(len(targets), chunk_rows(weight.shape[0])):
            _add_chunk(
                matmul.linear(hidden[chunk], matrix),
                losses[chunk], hidden, matrix, bias, targets, chunk, [dhidden, None, None],
                transform,
            )  # fmt: skip
        if ctx.head_trains:
            ctx.save_for_backward(hidden, weight, bias, targets)
        else:
            ctx.save_for_backward(dhidden)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.head_trains:
            (dhidden,) = ctx.saved_tensors
            return dhidden * gradient.unsqueeze(1).to(dhidden.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        gradients = [
            torch.zeros_like(t) if want and t is not None else None
            for want, t in zip(ctx.wants, (hidden, weight, bias), strict=True)
        ]
        matrix = weight.to(hidden.dtype)
        for chunk in _chunks(len(targets), chunk_rows(weight.shape[0])):
            losses = torch.empty(len(targets[chunk]), dtype=torch.float32, device=hidden.device)
            _add_chunk(
                matmul.linear(hidden[chunk], matrix),
                losses, hidden, matrix, bias, targets, chunk, gradients, ctx.transform, gradient,
            )  # fmt: skip
        return *gradients, None, None


class _HeadLoss(torch.autograd.Function):
    """Chunked cross-entropy: e = exp(logit - max), s = sum(e), dlogit = e / s - target."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform | None,
    ) -> tuple[Tensor, Tensor]:
        wants = ctx.needs_input_grad[:3]
        matrix = weight.to(hidden.dtype)
        gradients = [
            torch.zeros_like(t) if want and t is not None else None
            for want, t in zip(wants, (hidden, weight, bias), strict=True)
        ]
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for chunk in _chunks(len(targets), chunk_rows(weight.shape[0])):
            # no variable: it would keep one chunk alive while the next is computed
            _add_chunk(
                matmul.linear(hidden[chunk], matrix),
                losses[chunk], hidden, matrix, bias, targets, chunk, gradients, transform,
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
    """Ranges of `rows` targets; a single one left over would recompile, so it joins the last."""
    starts = list(range(0, targets, rows))
    if len(starts) > 1 and targets - starts[-1] == 1:
        starts.pop()
    return map(slice, starts, [*starts[1:], targets])


def _add_chunk(
    logits: Tensor,
    losses: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: slice,
    gradients: list[Tensor | None],
    transform: LogitTransform | None,
    scale: Tensor | None = None,
) -> None:
    """Compute a chunk's losses [c] and add to the gradients; overwrites its logits [c, V].

    Args:
        scale: of the gradient of each target [K]; None for 1.
    """
    logits = logits.float()
    if bias is not None:
        logits += bias
    learns = any(g is not None for g in gradients)
    if transform is None:
        cross_entropy_inplace(logits, losses, targets[chunk], learns=learns)
    else:
        logits = _cross_entropy_before(transform, logits, losses, targets[chunk], learns=learns)
    if learns:
        if scale is not None:
            logits = logits * scale[chunk].unsqueeze(1)
        _add_gradients(logits.to(hidden.dtype), hidden[chunk], matrix, chunk, gradients)


def _cross_entropy_before(
    transform: LogitTransform, logits: Tensor, losses: Tensor, targets: Tensor, *, learns: bool
) -> Tensor:
    """Write losses [c] of transformed logits [c, V]; return the gradient of the untransformed."""
    with torch.set_grad_enabled(learns):
        transformed = transform(logits.requires_grad_(learns))
    gradient = transformed.detach()
    cross_entropy_inplace(gradient, losses, targets, learns=learns)
    return torch.autograd.grad(transformed, logits, gradient)[0] if learns else gradient


def cross_entropy_inplace(logits: Tensor, losses: Tensor, targets: Tensor, *, learns: bool) -> None:
    """Write losses [c] of logits [c, V], which become their own gradient if `learns`."""
    rows, width = logits.shape
    if native.supports_contiguous(logits, losses) and _all_in_range(targets, width):
        native.call("cross_entropy", logits, targets, losses, rows, width)
    else:
        _cross_entropy_by_torch(logits, losses, targets, learns)


def _all_in_range(targets: Tensor, vocabulary: int) -> bool:
    return bool(((targets >= 0) & (targets < vocabulary)).all())


@compile_on_gpu
def _cross_entropy_by_torch(logits: Tensor, losses: Tensor, targets: Tensor, learns: bool) -> None:
    indices = targets.unsqueeze(1)
    target_logits = logits.gather(1, indices)
    greatest = logits.amax(1, keepdim=True)
    logits.sub_(greatest).exp_()
    total = logits.sum(1, keepdim=True)
    torch.sub(total.log() + greatest, target_logits, out=losses.unsqueeze(1))
    if learns:
        logits.div_(total).scatter_add_(1, indices, torch.full_like(target_logits, -1.0))


def _add_gradients(
    dlogits: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    chunk: slice,
    gradients: list[Tensor | None],
) -> None:
    dhidden, dweight, dbias = gradients
    if dhidden is not None:
        dhidden[chunk] = matmul.mm(dlogits, matrix)
    if dweight is not None:
        dweight += (dlogits.t() @ hidden).to(dweight.dtype)
    if dbias is not None:
        dbias += dlogits.sum(0)
