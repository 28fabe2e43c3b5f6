"""Frozen layers of one input, with their LoRA adapters (arXiv:2106.09685), as one function.

    y_i = x W_iᵀ + s_i (x A_iᵀ) B_iᵀ

Kept for backward: x, or what x is made from, and the small products x A_iᵀ. The gradient of x is
added up in one tensor, the adapters' A meet it as one matrix, and a frozen W gets no gradient.

Letters: T tokens, h width of x, o of y, r rank of an adapter, R of all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtrain.models.kernels import native
from dtrain.models.kernels.fused import in_one_pass
from dtrain.models.kernels.products import add_times, times, times_transposed
from dtrain.models.kernels.recompute import parts_of


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it stands at a call.

    Attributes:
        a, b: [r, h] and [o, r].
        scale: of the product.
        kept_scale: what dropout multiplies by what it keeps.
    """

    a: Tensor
    b: Tensor
    scale: float
    kept_scale: float = 1.0


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer as it stands at a call.

    Attributes:
        weight: [o, h], or packed in 4 bits.
        packed: how it is packed, if it is.
        bias: [o].
        adapter: what trains on it, if anything.
    """

    weight: Tensor
    packed: QuantState | None = None
    bias: Tensor | None = None
    adapter: Adapter | None = None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """[o, h] in `dtype`; unpacked at each call, as it is needed for one product only."""
        weight = self.weight
        if self.packed is not None:
            weight = dequantize_4bit(weight.view(-1, 1), self.packed)
        return weight.to(dtype)


Layers = Sequence[Layer]
Masks = Sequence[Tensor]


def shared_input(x: Tensor, layers: Layers, masks: Masks = ()) -> tuple[Tensor, ...]:
    """What each layer makes of the same x.

    Args:
        x: [1, T, h].
        layers: with weights that do not train.
        masks: bool [1, T, h] for each adapter, what dropout keeps of its x; empty: no dropout.

    Returns:
        [1, T, o] of each layer, in autocast's dtype if that is on.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    trained = [t for adapter in _adapters(layers) for t in (adapter.a, adapter.b)]
    with torch.autocast(kind, enabled=False):
        outputs: tuple[Tensor, ...] = _SharedInput.apply(x, layers, masks, *trained)
    # Views made out here: autograd lets nobody write to a view that a function returns.
    return tuple(y.view(*x.shape[:-1], -1) for y in outputs)


class _SharedInput(torch.autograd.Function):
    # Weights are held, not saved: engines that shard them gather them into the same tensor again.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Layers, masks: Masks, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        """Return [T, o] of each layer."""
        flat = x.flatten(0, -2)
        small = _small_products(flat, _adapters(layers), masks)
        ctx.make, parts = parts_of(x)
        ctx.layers, ctx.counts = layers, (len(parts), len(masks), len(small))
        ctx.save_for_backward(*parts, *masks, *small)
        each = iter(small)
        ctx.shape = x.shape
        return tuple(
            _output(flat, layer, next(each) if layer.adapter else None) for layer in layers
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *flat: Tensor) -> tuple[Tensor | None, ...]:
        saved, layers = iter(ctx.saved_tensors), ctx.layers
        parts, masks, small = ([next(saved) for _ in range(count)] for count in ctx.counts)
        dx = _through_weights(flat, layers) if ctx.needs_input_grad[0] else None
        trained = list[Tensor]()
        if small:
            reaching = [g for g, layer in zip(flat, layers, strict=True) if layer.adapter]
            x = ctx.make(*parts).flatten(0, -2)
            trained = _adapter_gradients(reaching, x, dx, _adapters(layers), masks, small)
        return dx if dx is None else dx.view(ctx.shape), None, None, *trained


def _adapters(layers: Layers) -> list[Adapter]:
    return [layer.adapter for layer in layers if layer.adapter is not None]


def _output(x: Tensor, layer: Layer, small: Tensor | None) -> Tensor:
    """y [T, o] from x [T, h] and the small product [T, r]."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    y = times_transposed(x, layer.matrix(x.dtype), bias)
    if layer.adapter is not None and small is not None:
        y.addmm_(small, layer.adapter.b.to(x.dtype).t(), alpha=layer.adapter.scale)
    return y


def _small_products(x: Tensor, adapters: Sequence[Adapter], masks: Masks) -> list[Tensor]:
    """x A_iᵀ [T, r] of each adapter; without dropout one product makes them all."""
    if not adapters:
        return []
    if not masks:
        together = times_transposed(x, _stacked(adapters, x.dtype))
        return list(together.split(_ranks(adapters), dim=1))
    each = zip(adapters, masks, strict=True)
    return [times_transposed(_dropped(x, a, mask), a.a.to(x.dtype)) for a, mask in each]


def _stacked(adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """All A [R, h]."""
    return torch.cat([adapter.a for adapter in adapters]).to(dtype)


def _ranks(adapters: Sequence[Adapter]) -> list[int]:
    return [adapter.a.shape[0] for adapter in adapters]


def _dropped(x: Tensor, adapter: Adapter, mask: Tensor) -> Tensor:
    """What dropout leaves of [T, h]; its own gradient too."""
    if not _is_plain(x, mask):
        return _dropped_by_torch(x, adapter.kept_scale, mask.flatten(0, -2))
    result = torch.empty_like(x)
    native.call("drop", x, mask, result, x.numel(), adapter.kept_scale)
    return result


@in_one_pass
def _dropped_by_torch(x: Tensor, kept_scale: float, mask: Tensor) -> Tensor:
    return (x * kept_scale).mul_(mask)


def _add_dropped(to: Tensor, x: Tensor, adapter: Adapter, mask: Tensor) -> None:
    if _is_plain(x, mask) and native.fits_flat(to):
        native.call("add_dropped", x, mask, to, x.numel(), adapter.kept_scale)
    else:
        to.add_(_dropped(x, adapter, mask))


def _is_plain(x: Tensor, mask: Tensor) -> bool:
    return native.fits_flat(x) and mask.is_contiguous() and mask.dtype == torch.bool


def _through_weights(gradients: Sequence[Tensor], layers: Layers) -> Tensor:
    """The gradient of x [T, h] through the frozen weights."""
    first, *others = zip(gradients, layers, strict=True)
    dx = times(first[0], first[1].matrix(first[0].dtype))
    for gradient, layer in others:
        dx = add_times(dx, gradient, layer.matrix(gradient.dtype))
    return dx


def _adapter_gradients(
    gradients: Sequence[Tensor],
    x: Tensor,
    dx: Tensor | None,
    adapters: Sequence[Adapter],
    masks: Masks,
    small: Sequence[Tensor],
) -> list[Tensor]:
    """dA_1, dB_1, dA_2, …; what goes through the adapters is added to dx."""
    inner, db = list[Tensor](), list[Tensor]()
    for gradient, adapter, product in zip(gradients, adapters, small, strict=True):
        inner.append(times(gradient, adapter.b.to(x.dtype)).mul_(adapter.scale))
        # in this order: a tall thin product is several times as slow as a wide flat one
        db.append(times(product.t(), gradient).mul_(adapter.scale).t().to(adapter.b.dtype))
    da = (
        _a_with_dropout(inner, x, dx, adapters, masks)
        if masks
        else _a_together(inner, x, dx, adapters)
    )
    da = [found.to(adapter.a.dtype) for found, adapter in zip(da, adapters, strict=True)]
    return [found for pair in zip(da, db, strict=True) for found in pair]


def _a_together(
    inner: Sequence[Tensor], x: Tensor, dx: Tensor | None, adapters: Sequence[Adapter]
) -> list[Tensor]:
    """dA of each adapter from the gradients [T, r] of the small products."""
    joined = torch.cat(list(inner), dim=1)
    if dx is not None:
        dx.addmm_(joined, _stacked(adapters, x.dtype))
    return list((joined.t() @ x).split(_ranks(adapters)))


def _a_with_dropout(
    inner: Sequence[Tensor],
    x: Tensor,
    dx: Tensor | None,
    adapters: Sequence[Adapter],
    masks: Masks,
) -> list[Tensor]:
    """As `_a_together`; each adapter saw an x of its own."""
    found = []
    for gradient, adapter, mask in zip(inner, adapters, masks, strict=True):
        found.append(gradient.t() @ _dropped(x, adapter, mask))
        if dx is not None:
            _add_dropped(dx, gradient @ adapter.a.to(x.dtype), adapter, mask)
    return found
