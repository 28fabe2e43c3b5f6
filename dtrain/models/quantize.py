"""The frozen base in NF4 (QLoRA, arXiv:2305.14314): double quantization, blocks of 64.

On a CPU bitsandbytes packs with ten torch operations. `pack_natively` replaces them by one loop
that gives the same bits in a twelfth of the time, which is most of loading or merging such a base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from ctypes import CDLL
from functools import cache
from importlib import import_module
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dtrain.core.errors import UserError
from dtrain.models.expert_layers import expert_parameters, router_layers
from dtrain.models.kernels import native
from dtrain.models.meta_model import (
    build_meta_model,
    linear_layers,
    unused_linear_layers,
)
from dtrain.models.weight_reads import layers_read_outside_forward

PER_FLOAT = 8  # 4-bit weights in a float32
WITHOUT_NF4 = "a base in 16 bits: method.kind=lora, dora, …, without method.quantize"
PACK_OPERATION = "bitsandbytes::quantize_4bit"


def nf4_config(dtype: torch.dtype, spared: Iterable[str]) -> BitsAndBytesConfig:
    """bitsandbytes' settings for NF4.

    The weights are stored in the compute dtype: FSDP2 shards only float tensors, and would silently
    leave a base in uint8 whole on every rank.

    Args:
        spared: names of the linear layers that are not quantized.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=dtype,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(spared),  # bitsandbytes' name, for 4 bits too
    )


def forbid_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking NF4 weights in place.

    On CPUs with bfloat16 units it repacks a layer at its first forward pass in evaluation mode:
    later training steps would compute with other numbers (2.7e-3 off in a logit of a tiny Llama),
    and a sharded weight would change its dtype and shape under the engine.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_quantized(model: nn.Module, names: Iterable[str]) -> None:
    """Check that every layer that should be in NF4 is.

    Args:
        names: from `nf4_layers`.

    Raises:
        UserError: a layer is not; the error names it.
    """
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, Linear4bit) or not isinstance(module.weight, Params4bit):
            raise _layer_not_nf4(name, module)


def nf4_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers to quantize.

    Args:
        model: from `build_meta_model`, so that errors come before anything is loaded.

    Raises:
        UserError: a layer is not torch's own Linear (bitsandbytes would skip it, or pack it
            transposed, which no merge could undo), its packed weight does not fill whole floats, or
            nothing would be in NF4.
    """
    layers = packable_layers(model)
    for name, module in layers.items():
        if type(module) is not nn.Linear or module.weight.numel() % PER_FLOAT:
            raise _layer_not_nf4(name, module)
    if not layers and not expert_parameters(model):
        message = f"nothing of {model.config.model_type!r} can be quantized to NF4"
        raise UserError(message, where="method.kind", fix=WITHOUT_NF4)
    return set(layers)


def packable_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers that belong in NF4, by name, whether bitsandbytes can pack them or not.

    All that a text reaches, except routers, the output matrix, and layers whose weight other code
    of the model reads: it would take packed bits for numbers.

    Args:
        model: from `build_meta_model`.
    """
    output = model.get_output_embeddings()
    # transformers also spares the last module: in Gemma 3n a projection, not the head
    spared = [] if output is not None else get_keys_to_not_convert(model)
    spared += model._keep_in_fp32_modules or ()
    left_out = unused_linear_layers(model) | router_layers(model)
    left_out |= layers_read_outside_forward(model)
    return {
        name: module
        for name, module in linear_layers(model).items()
        if module is not output and should_convert_module(name, spared) and name not in left_out
    }


def names_to_skip(config: PretrainedConfig, trust_remote_code: bool) -> list[str]:
    """Ends of the names of layers that transformers would quantize, and training did not.

    Returns:
        A value for llm_int8_skip_modules; empty if there are none.
    """
    model = build_meta_model(config, trust_remote_code)
    packed = _ends(packable_layers(model))
    kept = _ends(layers_read_outside_forward(model) | router_layers(model))
    # Not those of a tower that are named as the text's.
    kept |= _ends(unused_linear_layers(model)) - packed
    if not kept:
        return []
    output = model.get_output_embeddings()
    return sorted(kept | _ends(n for n, layer in linear_layers(model).items() if layer is output))


def _ends(names: Iterable[str]) -> set[str]:
    """What follows a layer's number in each name."""
    return {re.split(r"\.\d+\.", name)[-1] for name in names}


def _layer_not_nf4(name: str, module: Any) -> UserError:
    return not_nf4(name, type(module).__name__, list(module.weight.shape))


def not_nf4(name: str, kind: str, shape: list[int]) -> UserError:
    """The error for what NF4 cannot hold."""
    message = f"{name} ({kind} {shape}) cannot be quantized to NF4"
    return UserError(message, where="method.kind", fix=WITHOUT_NF4)


def quantization_state(layer: Any) -> QuantState:
    """The quantization state of an NF4 layer's weight, which FSDP2's gathered weights lack."""
    fix_4bit_weight_quant_state_from_module(layer)
    state: QuantState = layer.weight.quant_state
    return state


def dequantized(weight: Tensor, state: QuantState) -> Tensor:
    """The values [o, h] of a packed weight."""
    values: Tensor = dequantize_4bit(weight.view(-1, 1), state)
    return values


def rounded_to_nf4(weight: Tensor) -> Tensor:
    """A weight as a base in NF4 computes with it."""
    packed, state = quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    return dequantized(packed, state)


@cache
def pack_natively() -> bool:
    """Let bitsandbytes pack with the compiled loop; return whether it does."""
    loops, _ = native.load_loops()
    if loops is None or torch._C._dispatch_has_kernel_for_dispatch_key(PACK_OPERATION, "CPU"):
        return False
    if (bounds_of := _bounds_of()) is None:
        return False

    def pack(
        x: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        bounds, codes = bounds_of(quant_type, x.device)
        codes = torch.arange(16) if quant_type == "nf4" else codes
        packed, scales = _pack(loops, x, blocksize, bounds, codes.to(torch.int32))
        return packed.view(quant_storage).unsqueeze(1), scales

    torch.library.register_kernel(PACK_OPERATION, "cpu", pack)
    return True


def _bounds_of() -> Callable[[str, torch.device], tuple[Tensor, Tensor]] | None:
    """bitsandbytes' rounding bounds of each 4-bit type; None if this version has no such table."""
    try:
        ops = import_module("bitsandbytes.backends.default.ops")
    except ImportError:
        return None
    return getattr(ops, "_get_4bit_quantize_bounds", None)


def _pack(
    loops: CDLL, x: Tensor, blocksize: int, bounds: Tensor, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Pack n floats into bytes [(n + 1) / 2] and scales [n / blocksize]."""
    values = x.reshape(-1).float().contiguous()
    n = values.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(-(n // -blocksize), dtype=torch.float32)
    native.call_in(loops, "pack_4bit", values, bounds, codes, packed, scales, n, blocksize)
    return packed, scales
