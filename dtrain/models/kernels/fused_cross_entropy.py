"""Output layer and cross entropy in one function, a few tokens at a time.

The logits of a large vocabulary are the largest tensor of a step. Here each chunk of them exists
only until its loss and gradient are computed, as in Liger (arXiv:2410.10989); backward only scales.
Letters: K target tokens, h width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from dtrain.models.kernels import matmul, native
from dtrain.models.kernels.compiled import compile_on_gpu
from dtrain.models.kernels.output_probe import LogitTransform
from dtrain.models.token_rows import output_weight
from dtrain.planning.activations import chunk_rows

_ATTRIBUTE = "_dtrain_loss_head"

HeadFunction = Callable[[Tensor, Tensor, Tensor | None, LogitTransform | None], Tensor]
"""(hidden [K, h], weight [V, h], bias [V], transform) → what the model returns for its logits,
with two dimensions."""
ChunkLoss = Callable[[Tensor, slice, bool], Tensor]
"""(logits [c, V] in float32, their tokens, needs_gradient) → the gradient of these tokens' loss; it
may overwrite the logits. Without `needs_gradient` the result is not used."""


class FusedLossHead:
    """Makes a model's output layer compute a function of hidden states in place of the logits.

    Attributes:
        base_layer: the output layer as it is without trained rows.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module, transform: LogitTransform | None = None
    ) -> None:
        """Replace the forward of `head`.

        Args:
            head: the output layer, or what PEFT puts around one that has trained rows.
            transform: what the model applies to the logits [c, V] afterwards.
        """
        self._model, self.layer, self.transform = model, head, transform
        self._rows: Any = head.token_adapter if isinstance(head, TrainableTokensWrapper) else None
        base: Any = head if self._rows is None else self._rows.base_layer
        self.base_layer: nn.Linear = base
        self._compute: HeadFunction | None = None
        head.forward = self._forward
        setattr(model, _ATTRIBUTE, self)

    @staticmethod
    def of(model: nn.Module) -> FusedLossHead | None:
        """The loss head of a model, if it has one."""
        head: FusedLossHead | None = getattr(model, _ATTRIBUTE, None)
        return head

    @contextmanager
    def computing(self, compute: HeadFunction) -> Iterator[None]:
        """Let the model return `compute` of the K tokens whose logits are asked for, [1, …]."""
        self._compute = compute
        with ExitStack() as stack:
            stack.callback(setattr, self, "_compute", None)
            if self.transform is not None:
                self._bypass_model(stack)
            yield

    def _bypass_model(self, stack: ExitStack) -> None:
        """Return the function's value as the model's logits, without the transform."""
        values: list[Tensor] = []

        def set_logits(_: nn.Module, args: Any, output: Any) -> Any:
            output.logits = values.pop()
            return output

        # engines' own hooks see the head's output first, and the model's output last
        hook = self.layer.register_forward_hook(lambda *call: values.append(call[-1]))
        stack.callback(hook.remove)
        stack.callback(self._model.register_forward_hook(set_logits, prepend=True).remove)

    def _forward(self, hidden: Tensor) -> Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if self._rows is not None:
            weight = output_weight(self._rows)
        if self._compute is None:
            return linear(hidden, weight, bias)
        return self._compute(hidden.flatten(0, -2), weight, bias, self.transform).unsqueeze(0)


def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform | None = None,
    smoothing: float = 0.0,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `hidden @ weight.T + bias` against targets, in float32.

    Args:
        hidden: [K, h].
        weight: [V, h].
        bias: [V].
        targets: int64 [K].
        transform: applied to the logits [c, V] of a chunk before the softmax.
        smoothing: share of the target's probability that all tokens get evenly.
        factors: float32 [K], of each loss in the sum; None for 1.

    Returns:
        Their sum, and the loss of each [K], without its factor and without a gradient.
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    chunk_loss = _cross_entropy_of(targets, losses, smoothing)
    total = chunked_head_loss(hidden, weight, bias, transform, losses, chunk_loss, factors)
    return total, losses


def chunked_head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform | None,
    losses: Tensor,
    chunk_loss: ChunkLoss,
    factors: Tensor | None = None,
) -> Tensor:
    """Sum a loss of the logits `hidden @ weight.T + bias`, a chunk of tokens at a time.

    Args:
        hidden: [K, h].
        weight: [V, h].
        bias: [V].
        transform: applied to the logits [c, V] of a chunk before its loss.
        losses: float32 [K], of each token; `chunk_loss` writes those of its chunk.
        factors: float32 [K], of each loss in the sum; None for 1.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _HeadLoss.apply(
            in_autocast_dtype(hidden), weight, bias, transform, losses, chunk_loss, factors
        )
    return total


def in_autocast_dtype(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype that autocast computes in, if it is on."""
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden


def _cross_entropy_of(targets: Tensor, losses: Tensor, smoothing: float = 0.0) -> ChunkLoss:
    """The cross-entropy of targets [K], written to losses [K]."""

    def chunk_loss(logits: Tensor, chunk: slice, needs_gradient: bool) -> Tensor:
        if not smoothing:
            cross_entropy_inplace(
                logits, losses[chunk], targets[chunk], needs_gradient=needs_gradient
            )
            return logits
        indices = targets[chunk].unsqueeze(1)
        margins = logits.gather(1, indices).squeeze(1) - logits.mean(1)
        cross_entropy_inplace(logits, losses[chunk], targets[chunk], needs_gradient=needs_gradient)
        losses[chunk] += smoothing * margins
        if needs_gradient:
            logits -= smoothing / logits.shape[1]
            logits.scatter_add_(1, indices, torch.full_like(margins, smoothing).unsqueeze(1))
        return logits

    return chunk_loss


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
    with torch.autocast(hidden.device.type, enabled=False):
        losses: Tensor = _TokenLosses.apply(
            in_autocast_dtype(hidden), weight, bias, targets, transform
        )
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
        chunk_loss = _cross_entropy_of(targets, losses)
        _add_chunks(hidden, weight, bias, transform, chunk_loss, [dhidden, None, None])
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
        chunk_loss = _cross_entropy_of(targets, torch.empty_like(gradient))
        _add_chunks(hidden, weight, bias, ctx.transform, chunk_loss, gradients, gradient)
        return *gradients, None, None


class _HeadLoss(torch.autograd.Function):
    """The sum of a chunked loss; the forward pass computes its gradient too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform | None,
        losses: Tensor,
        chunk_loss: ChunkLoss,
        factors: Tensor | None,
    ) -> Tensor:
        ctx.wants = ctx.needs_input_grad[:3]
        gradients = [
            torch.zeros_like(t) if want and t is not None else None
            for want, t in zip(ctx.wants, (hidden, weight, bias), strict=True)
        ]
        _add_chunks(hidden, weight, bias, transform, chunk_loss, gradients, factors)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        return losses.sum() if factors is None else (losses * factors).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        known = iter(ctx.saved_tensors)
        scaled = (next(known) * gradient if want else None for want in ctx.wants)
        return *scaled, None, None, None, None


def _add_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform | None,
    chunk_loss: ChunkLoss,
    gradients: list[Tensor | None],
    scale: Tensor | None = None,
) -> None:
    """Compute the loss of every chunk and add to the gradients of hidden, weight and bias.

    Args:
        scale: of the gradient of each token [K]; None for 1.
    """
    matrix = weight.to(hidden.dtype)
    needs_gradient = any(g is not None for g in gradients)
    for chunk in _chunks(len(hidden), chunk_rows(weight.shape[0])):
        # no variables: they would keep one chunk alive while the next is computed
        _add_gradients(
            _scaled(
                _logit_gradient(
                    logit_chunk(hidden[chunk], matrix, bias),
                    chunk, transform, chunk_loss, needs_gradient,
                ),
                chunk, scale,
            ),
            hidden[chunk], matrix, chunk, gradients,
        )  # fmt: skip


def logit_chunk(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 logits [c, V] of hidden states [c, h], before the model's transform."""
    logits = matmul.linear(hidden, matrix).float()
    if bias is not None:
        logits += bias
    return logits


def _chunks(targets: int, rows: int) -> Iterator[slice]:
    """Ranges of `rows` targets; a single one left over would recompile, so it joins the last."""
    starts = list(range(0, targets, rows))
    if len(starts) > 1 and targets - starts[-1] == 1:
        starts.pop()
    return map(slice, starts, [*starts[1:], targets])


def _logit_gradient(
    logits: Tensor,
    chunk: slice,
    transform: LogitTransform | None,
    chunk_loss: ChunkLoss,
    needs_gradient: bool,
) -> Tensor:
    """The gradient [c, V] of a chunk's loss by its logits before the transform."""
    if transform is None:
        return chunk_loss(logits, chunk, needs_gradient)
    with torch.set_grad_enabled(needs_gradient):
        transformed = transform(logits.requires_grad_(needs_gradient))
    gradient = chunk_loss(transformed.detach(), chunk, needs_gradient)
    return torch.autograd.grad(transformed, logits, gradient)[0] if needs_gradient else gradient


def _scaled(gradient: Tensor, chunk: slice, scale: Tensor | None) -> Tensor:
    return gradient if scale is None else gradient * scale[chunk].unsqueeze(1)


def cross_entropy_inplace(
    logits: Tensor, losses: Tensor, targets: Tensor, *, needs_gradient: bool
) -> None:
    """Write losses [c] of logits [c, V], which become their own gradient if `needs_gradient`."""
    rows, width = logits.shape
    if native.supports_contiguous(logits, losses) and _all_in_range(targets, width):
        native.call("cross_entropy", logits, targets, losses, rows, width)
    else:
        _cross_entropy_by_torch(logits, losses, targets, needs_gradient)


def _all_in_range(targets: Tensor, vocabulary: int) -> bool:
    return bool(((targets >= 0) & (targets < vocabulary)).all())


@compile_on_gpu
def _cross_entropy_by_torch(
    logits: Tensor, losses: Tensor, targets: Tensor, needs_gradient: bool
) -> None:
    indices = targets.unsqueeze(1)
    target_logits = logits.gather(1, indices)
    greatest = logits.amax(1, keepdim=True)
    logits.sub_(greatest).exp_()
    total = logits.sum(1, keepdim=True)
    torch.sub(total.log() + greatest, target_logits, out=losses.unsqueeze(1))
    if needs_gradient:
        logits.div_(total).scatter_add_(1, indices, torch.full_like(target_logits, -1.0))


def _add_gradients(
    dlogits: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    chunk: slice,
    gradients: list[Tensor | None],
) -> None:
    if all(gradient is None for gradient in gradients):
        return
    dlogits = dlogits.to(hidden.dtype)
    dhidden, dweight, dbias = gradients
    if dhidden is not None:
        dhidden[chunk] = matmul.mm(dlogits, matrix)
    if dweight is not None:
        dweight += (dlogits.t() @ hidden).to(dweight.dtype)
    if dbias is not None:
        dbias += dlogits.sum(0)
