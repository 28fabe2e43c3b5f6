"""Frozen linear layers that share an input, with their LoRA adapters, as one autograd function.

    y_i = x W_iᵀ + s_i (x A_iᵀ) B_iᵀ    (arXiv:2106.09685)

Backward saves x, or what x is recomputed from, and the small products x A_iᵀ. It sums the gradient
of x in one tensor, multiplies all A at once, and computes no gradient of the frozen W. DoRA's scale
of each output is a second function, in `dtrain/models/dora.py`.

Letters: T tokens, h width of x, o of y, r rank of an adapter, R sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dtrain.models.difference import DifferenceVariant, first_factors
from dtrain.models.dora import DoraVariant, Magnitude, magnitude_of, scale_outputs
from dtrain.models.dropout import KeyedDropout
from dtrain.models.kernels import matmul, native
from dtrain.models.kernels.compiled import compile_on_gpu
from dtrain.models.kernels.elementwise import recorded_inputs
from dtrain.models.kernels.same_program import runs_its_class
from dtrain.models.quantize import dequantized, quantization_state


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA adapter's weights at a call.

    Attributes:
        a, b: [r, h] and [o, r].
        scale: factor of B·A.
        keep_scale: factor by which dropout scales what it keeps.
        magnitude: of a DoRA layer; None without DoRA.
    """

    a: Tensor
    b: Tensor
    scale: float
    keep_scale: float = 1.0
    magnitude: Magnitude | None = None


@dataclass(frozen=True)
class FrozenLinear:
    """A frozen linear layer's weights at a call.

    Attributes:
        weight: [o, h], or packed in 4 bits.
        packed: the quantization state of a packed weight.
        bias: [o].
        adapter: its LoRA adapter, if it has one.
    """

    weight: Tensor
    packed: QuantState | None = None
    bias: Tensor | None = None
    adapter: LoraWeights | None = None

    @property
    def magnitude(self) -> Magnitude | None:
        """The adapter's magnitude, if it has one."""
        return None if self.adapter is None else self.adapter.magnitude

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [o, h] in `dtype`; a packed one is unpacked at each call."""
        weight = self.weight if self.packed is None else dequantized(self.weight, self.packed)
        return weight.to(dtype)


VARIANTS = (DifferenceVariant, DoraVariant)
FrozenLinears = Sequence[FrozenLinear]
Masks = Sequence[Tensor]


def shared_input_linears(x: Tensor, layers: FrozenLinears, masks: Masks = ()) -> tuple[Tensor, ...]:
    """Compute the outputs of several layers for the same x.

    Args:
        x: [1, T, h].
        layers: their weights do not train.
        masks: bool [1, T, h] for each adapter, which elements of x its dropout keeps; empty
            without dropout.

    Returns:
        [1, T, o] of each layer, in autocast's dtype if that is on.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    trained = [t for adapter in _adapters(layers) for t in (adapter.a, adapter.b)]
    with torch.autocast(kind, enabled=False):
        results = iter(_SharedInput.apply(x, layers, masks, *trained))
        outputs = [next(results) for _ in layers]
        for index, layer in enumerate(layers):
            if layer.magnitude is not None:
                gain = layer.magnitude.weight.float() / next(results)
                outputs[index] = scale_outputs(outputs[index], gain, layer.bias)
    # Reshape out here: autograd forbids in-place writes to views that a function returns.
    return tuple(y.view(*x.shape[:-1], -1) for y in outputs)


class _SharedInput(torch.autograd.Function):
    # Weights are referenced, not saved: sharding engines gather them into the same tensor again.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: FrozenLinears, masks: Masks, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        flat = x.flatten(0, -2)
        small = _small_products(flat, _adapters(layers), masks)
        ctx.recompute, inputs = recorded_inputs(x)
        ctx.layers, ctx.counts = layers, (len(inputs), len(masks), len(small))
        ctx.save_for_backward(*inputs, *masks, *small)
        products, norms = iter(small), list[Tensor]()
        ctx.shape = x.shape
        outputs = [
            _output(flat, layer, next(products) if layer.adapter else None, norms)
            for layer in layers
        ]
        ctx.mark_non_differentiable(*norms)
        return *outputs, *norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *flat: Tensor) -> tuple[Tensor | None, ...]:
        saved, layers = iter(ctx.saved_tensors), ctx.layers
        flat = flat[: len(layers)]
        inputs, masks, small = ([next(saved) for _ in range(count)] for count in ctx.counts)
        dx = _input_gradient(flat, layers) if ctx.needs_input_grad[0] else None
        trained = list[Tensor]()
        if small:
            gradients = [g for g, layer in zip(flat, layers, strict=True) if layer.adapter]
            x = ctx.recompute(*inputs).flatten(0, -2)
            trained = _adapter_gradients(gradients, x, dx, _adapters(layers), masks, small)
        return dx if dx is None else dx.view(ctx.shape), None, None, *trained


def _adapters(layers: FrozenLinears) -> list[LoraWeights]:
    return [layer.adapter for layer in layers if layer.adapter is not None]


def _output(x: Tensor, layer: FrozenLinear, small: Tensor | None, norms: list[Tensor]) -> Tensor:
    """Compute y [T, o] from x [T, h] and the small product [T, r].

    For a DoRA layer append the norms of its rows to `norms`, and leave out the bias, which comes
    after the scale.
    """
    matrix = layer.matrix(x.dtype)
    bias = None if layer.bias is None or layer.magnitude else layer.bias.to(x.dtype)
    y = matmul.linear(x, matrix, bias)
    if layer.adapter is not None and small is not None:
        a, b, scale = layer.adapter.a, layer.adapter.b, layer.adapter.scale
        y.addmm_(small, b.to(x.dtype).t(), alpha=scale)
        if layer.magnitude is not None:
            norms.append(layer.magnitude.norms(matrix, a, b, scale))
    return y


def _small_products(x: Tensor, adapters: Sequence[LoraWeights], masks: Masks) -> list[Tensor]:
    """x A_iᵀ [T, r] of each adapter; without dropout they are one matrix product."""
    if not adapters:
        return []
    if not masks:
        together = matmul.linear(x, _stacked(adapters, x.dtype))
        return list(together.split(_ranks(adapters), dim=1))
    each = zip(adapters, masks, strict=True)
    return [matmul.linear(_dropped(x, a, mask), a.a.to(x.dtype)) for a, mask in each]


def _stacked(adapters: Sequence[LoraWeights], dtype: torch.dtype) -> Tensor:
    """The A of all adapters, [R, h]."""
    return torch.cat([adapter.a for adapter in adapters]).to(dtype)


def _ranks(adapters: Sequence[LoraWeights]) -> list[int]:
    return [adapter.a.shape[0] for adapter in adapters]


def _dropped(x: Tensor, adapter: LoraWeights, mask: Tensor) -> Tensor:
    """Apply dropout to [T, h]; the same function computes its gradient."""
    if not _is_plain(x, mask):
        return _dropped_by_torch(x, adapter.keep_scale, mask.flatten(0, -2))
    result = torch.empty_like(x)
    native.call("drop", x, mask, result, x.numel(), adapter.keep_scale)
    return result


@compile_on_gpu
def _dropped_by_torch(x: Tensor, keep_scale: float, mask: Tensor) -> Tensor:
    return (x * keep_scale).mul_(mask)


def _add_dropped(to: Tensor, x: Tensor, adapter: LoraWeights, mask: Tensor) -> None:
    if _is_plain(x, mask) and native.supports_contiguous(to):
        native.call("add_dropped", x, mask, to, x.numel(), adapter.keep_scale)
    else:
        to.add_(_dropped(x, adapter, mask))


def _is_plain(x: Tensor, mask: Tensor) -> bool:
    return native.supports_contiguous(x) and mask.is_contiguous() and mask.dtype == torch.bool


def _input_gradient(gradients: Sequence[Tensor], layers: FrozenLinears) -> Tensor:
    """The gradient of x [T, h] through the frozen weights."""
    first, *others = zip(gradients, layers, strict=True)
    dx = matmul.mm(first[0], first[1].matrix(first[0].dtype))
    for gradient, layer in others:
        dx = matmul.addmm(dx, gradient, layer.matrix(gradient.dtype))
    return dx


def _adapter_gradients(
    gradients: Sequence[Tensor],
    x: Tensor,
    dx: Tensor | None,
    adapters: Sequence[LoraWeights],
    masks: Masks,
    small: Sequence[Tensor],
) -> list[Tensor]:
    """dA_1, dB_1, dA_2, …; the part of the input's gradient through the adapters goes into dx."""
    inner, db = list[Tensor](), list[Tensor]()
    for gradient, adapter, product in zip(gradients, adapters, small, strict=True):
        inner.append(matmul.mm(gradient, adapter.b.to(x.dtype)).mul_(adapter.scale))
        # in this order: a tall, thin product takes several times as long as a wide, flat one
        db.append(matmul.mm(product.t(), gradient).mul_(adapter.scale).t().to(adapter.b.dtype))
    da = (
        _a_with_dropout(inner, x, dx, adapters, masks)
        if masks
        else _a_together(inner, x, dx, adapters)
    )
    da = [value.to(adapter.a.dtype) for value, adapter in zip(da, adapters, strict=True)]
    return [value for pair in zip(da, db, strict=True) for value in pair]


def _a_together(
    inner: Sequence[Tensor], x: Tensor, dx: Tensor | None, adapters: Sequence[LoraWeights]
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
    adapters: Sequence[LoraWeights],
    masks: Masks,
) -> list[Tensor]:
    """As `_a_together`, but each adapter has its own dropout mask."""
    da = []
    for gradient, adapter, mask in zip(inner, adapters, masks, strict=True):
        da.append(gradient.t() @ _dropped(x, adapter, mask))
        if dx is not None:
            _add_dropped(dx, gradient @ adapter.a.to(x.dtype), adapter, mask)
    return da


class SharedInputGroup:
    """Modules that are called one after the other with the same input.

    The first call computes all outputs; the others return theirs. A module that is called with
    another input computes alone, and its waiting output is dropped.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._input: Tensor | None = None
        self._input_key: tuple[object, ...] = ()
        self._waiting: dict[int, Tensor] = {}
        for index, module in enumerate(self._modules):
            module.forward = _MemberForward(self, index)

    def call(self, index: int, x: Tensor) -> Tensor:
        """The output of module `index` for x [1, T, h]."""
        waiting = self._waiting.pop(index, None)
        if waiting is not None and _alias_key(x) == self._input_key:
            result = waiting
        elif index == 0:
            result, *others = _compute(self._modules, x)
            self._waiting = dict(enumerate(others, start=1))
            # referenced, so that its memory is not reused
            self._input, self._input_key = x, _alias_key(x)
        else:
            (result,) = _compute([self._modules[index]], x)
        if not self._waiting:
            self._input = None
        return result


def _alias_key(x: Tensor) -> tuple[object, ...]:
    """A key that is equal for a tensor and its aliases, until someone writes to it.

    Under ZeRO-3 DeepSpeed gives every module its own alias.
    """
    version = 0 if x.is_inference() else x._version
    layout = x.shape, x.stride(), x.storage_offset()
    return x.untyped_storage()._cdata, layout, x.dtype, x.requires_grad, version


class _MemberForward:
    """The forward of one module of a group."""

    def __init__(self, group: SharedInputGroup, index: int) -> None:
        self._group, self._index = group, index

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.call(self._index, x)


def is_supported_linear(module: nn.Module) -> bool:
    """Whether `shared_input_linears` can replace it: frozen, plain or NF4, with LoRA or without."""
    base = module.base_layer if isinstance(module, LoraLayer) else module
    if not isinstance(base, nn.Linear) or any(p.requires_grad for p in base.parameters()):
        return False
    if type(base) not in (nn.Linear, Linear4bit) or not runs_its_class(base):
        return False
    return not isinstance(module, LoraLayer) or _is_plain_lora(module)


def _is_plain_lora(module: LoraLayer) -> bool:
    """Whether there is one adapter, without bias or variant except ours, and known dropout."""
    (name,) = module.lora_A if len(module.lora_A) == 1 else (None,)
    return (
        name is not None
        and isinstance(module.lora_A[name], nn.Linear)
        and all(isinstance(variant, VARIANTS) for variant in module.lora_variant.values())
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
        and isinstance(module.lora_dropout[name], nn.Identity | KeyedDropout)
    )


def _compute(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    dropouts = [_dropout(module) for module in modules if _adapts(module)]
    masks = [d.keep_mask(x) for d in dropouts if isinstance(d, KeyedDropout) and d.drops]
    return shared_input_linears(x, [_layer(module) for module in modules], masks)


def _adapts(module: nn.Module) -> bool:
    """Whether the module's adapter is active; PEFT disables it to compute the base alone."""
    return isinstance(module, LoraLayer) and not module.disable_adapters and not module.merged


def _layer(module: Any) -> FrozenLinear:
    base: Any = module.base_layer if isinstance(module, LoraLayer) else module
    packed = quantization_state(base) if isinstance(base, Linear4bit) else None
    return FrozenLinear(
        base.weight, packed, base.bias, _adapter(module) if _adapts(module) else None
    )


def _adapter(module: Any) -> LoraWeights:
    (name,) = module.active_adapters
    dropout = _dropout(module)
    keep_scale = dropout.scale if isinstance(dropout, KeyedDropout) else 1.0
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    if (first := first_factors(module, name)) is not None:  # B A - B₀ A₀ as one product
        a, b = torch.cat([a, first.a]), torch.cat([b, -first.b], dim=1)
    return LoraWeights(a, b, module.scaling[name], keep_scale, magnitude_of(module, name))


def _dropout(module: Any) -> nn.Module:
    (name,) = module.active_adapters
    dropout: nn.Module = module.lora_dropout[name]
    return dropout
