"""Which layers of a model share an input, and what they are at a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dtrain.models.dropout import KeyedDropout
from dtrain.models.kernels.linear import Adapter, Layer, shared_input
from dtrain.models.kernels.same_program import runs_its_class


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
