"""The frozen base in NF4 (QLoRA, arXiv:2305.14314): double quantisation, blocks of 64."""

from __future__ import annotations

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dtrain.core.errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 as dtrain uses it.

    Storage in the compute dtype, not in bytes: FSDP2 shards float tensors, and leaves a base
    held in uint8 whole on every rank without a word.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=dtype,
        bnb_4bit_compute_dtype=dtype,
    )


def forbid_repacking(model: nn.Module) -> None:
    """Keep NF4 weights as they are.

    On CPUs with bfloat16 units bitsandbytes repacks a layer at its first forward pass in
    evaluation mode, in place: later training steps compute with other numbers (2.7e-3 off in a
    logit of a tiny Llama), and a sharded weight changes dtype and shape under its engine.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_quantised(model: nn.Module) -> None:
    """Refuse layers whose NF4 form could not be merged back.

    Raises:
        UserError: GPT-2's layers, which bitsandbytes packs transposed.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and getattr(module, "source_cls", None) is Conv1D:
            raise UserError(
                f"{name} cannot be held in NF4", where="method.kind: qlora", fix="kind: lora"
            )


def through_nf4(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight matrix as a base that `load_base` quantised computes with it.

    Args:
        weight: [out, in] of the base's file.
        dtype: that the base was loaded in.

    Returns:
        [out, in] in `dtype`.
    """
    packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state)


def nf4_layers(config: PretrainedConfig, trust_remote_code: bool = False) -> set[str]:
    """Names of the layers that `load_base` quantises: the linear ones but the output matrix.

    The model is built without storage, so this costs no memory.

    Raises:
        UserError: it needs code that is not allowed.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"the model cannot be built: {str(error).splitlines()[0]}") from error
    spared = get_keys_to_not_convert(model)
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return {name for name in linear if should_convert_module(name, spared)}
