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
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dtrain.models.dropout import KeyedDropout
from dtrain.models.kernels import native
from dtrain.models.kernels.compiled import compile_on_gpu
from dtrain.models.kernels.matmul import add_times, times, times_transposed
from dtrain.models.kernels.rematerialize import parts_of
from dtrain.models.kernels.same_program import runs_its_class


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


@compile_on_gpu
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


class SharedInput:
    """Layers that are called one after the other with the same tensor.

    The first call computes for all; the others take what is theirs. A layer that is called with
    another tensor computes alone, and what was left for it is let go of.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._input: Tensor | None = None
        self._place: tuple[object, ...] = ()
        self._waiting: dict[int, Tensor] = {}
        for number, module in enumerate(self._modules):
            module.forward = _Member(self, number)

    def call(self, number: int, x: Tensor) -> Tensor:
        """What layer `number` makes of x [1, T, h]."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None and _place(x) == self._place:
            result = waiting
        elif number == 0:
            result, *others = _compute(self._modules, x)
            self._waiting = dict(enumerate(others, start=1))
            self._input, self._place = x, _place(x)  # held, so that its place stays its own
        else:
            (result,) = _compute([self._modules[number]], x)
        if not self._waiting:
            self._input = None
        return result


def _place(x: Tensor) -> tuple[object, ...]:
    """Equal for one tensor and for its aliases, as long as nobody writes to it.

    Under ZeRO-3 DeepSpeed hands every module an alias of its own.
    """
    version = 0 if x.is_inference() else x._version
    where = x.shape, x.stride(), x.storage_offset()
    return x.untyped_storage()._cdata, where, x.dtype, x.requires_grad, version


class _Member:
    """The forward of one layer."""

    def __init__(self, group: SharedInput, number: int) -> None:
        self._group, self._number = group, number

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.call(self._number, x)


def is_fast(module: nn.Module) -> bool:
    """Whether `shared_input` computes what this module does: frozen, plain or NF4, LoRA or none."""
    base = module.base_layer if isinstance(module, LoraLayer) else module
    if not isinstance(base, nn.Linear) or any(p.requires_grad for p in base.parameters()):
        return False
    if type(base) not in (nn.Linear, Linear4bit) or not runs_its_class(base):
        return False
    return not isinstance(module, LoraLayer) or _is_plain_lora(module)


def _is_plain_lora(module: LoraLayer) -> bool:
    """No variant such as DoRA, no bias, one adapter, and a dropout that we know."""
    (name,) = module.lora_A if len(module.lora_A) == 1 else (None,)
    return (
        name is not None
        and not module.lora_variant
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
        and isinstance(module.lora_dropout[name], nn.Identity | KeyedDropout)
    )


def _compute(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    dropouts = [_dropout(module) for module in modules if _adapts(module)]
    masks = [d.kept(x) for d in dropouts if isinstance(d, KeyedDropout) and d.drops]
    return shared_input(x, [_layer(module) for module in modules], masks)


def _adapts(module: nn.Module) -> bool:
    """Whether an adapter is at work; PEFT switches it off to ask what the base says."""
    return isinstance(module, LoraLayer) and not module.disable_adapters and not module.merged


def _layer(module: Any) -> Layer:
    base: Any = module.base_layer if isinstance(module, LoraLayer) else module
    packed = _packed(base) if isinstance(base, Linear4bit) else None
    return Layer(base.weight, packed, base.bias, _adapter(module) if _adapts(module) else None)


def _packed(base: Any) -> QuantState:
    """How a layer's weight is packed; FSDP2 gathers weights that have forgotten it."""
    fix_4bit_weight_quant_state_from_module(base)
    state: QuantState = base.weight.quant_state
    return state


def _adapter(module: Any) -> Adapter:
    (name,) = module.active_adapters
    dropout = _dropout(module)
    kept_scale = dropout.scale if isinstance(dropout, KeyedDropout) else 1.0
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return Adapter(a, b, module.scaling[name], kept_scale)


def _dropout(module: Any) -> nn.Module:
    (name,) = module.active_adapters
    dropout: nn.Module = module.lora_dropout[name]
    return dropout
