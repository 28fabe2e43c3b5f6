"""The frozen base in NF4 (QLoRA, arXiv:2305.14314): double quantisation, blocks of 64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dtrain.core.errors import UserError
from dtrain.models.outline import layers_read_by_others, linear_layers, unused_layers

PER_FLOAT = 8  # weights of four bits in a float32


def nf4_config(dtype: torch.dtype, spared: Iterable[str]) -> BitsAndBytesConfig:
    """NF4 as dtrain uses it.

    Storage in the compute dtype, not in bytes: FSDP2 shards float tensors, and leaves a base
    held in uint8 whole on every rank without a word.

    Args:
        spared: names of the linear layers that stay as they are.
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
    """Keep NF4 weights as they are.

    On CPUs with bfloat16 units bitsandbytes repacks a layer at its first forward pass in
    evaluation mode, in place: later training steps compute with other numbers (2.7e-3 off in a
    logit of a tiny Llama), and a sharded weight changes dtype and shape under its engine.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_quantised(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a model of which a layer is not in NF4 that should be.

    Args:
        names: from `nf4_layers`.

    Raises:
        UserError: naming the layer.
    """
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, Linear4bit) or not isinstance(module.weight, Params4bit):
            raise _not_nf4(name, module)


def nf4_layers(model: PreTrainedModel) -> set[str]:
    """Names of the layers that NF4 holds: what is linear and used, but the output matrix.

    Args:
        model: from `outline`, so that what cannot be packed is refused before anything is loaded.

    Raises:
        UserError: a linear layer of another kind than torch's own; bitsandbytes would leave it as
            it is, or pack it transposed, which no merge could undo. Or one whose packed weight
            does not fill whole floats, in which it is stored, or is read by other code.
    """
    output, unused = model.get_output_embeddings(), unused_layers(model)
    # transformers spares whatever module is last too: one of Gemma 3n's projections, not its head.
    spared = [] if output is not None else get_keys_to_not_convert(model)
    spared += model._keep_in_fp32_modules or ()
    found = {
        name: module
        for name, module in linear_layers(model).items()
        if module is not output and should_convert_module(name, spared) and name not in unused
    }
    for name, module in found.items():
        if type(module) is not nn.Linear or module.weight.numel() % PER_FLOAT:
            raise _not_nf4(name, module)
    if read := sorted(found.keys() & layers_read_by_others(model)):
        raise UserError(
            f"the model's code reads the weight of {read[0]} itself, which NF4 would hide from it",
            where="method.kind: qlora",
            fix="kind: lora",
        )
    return set(found)


def _not_nf4(name: str, module: Any) -> UserError:
    kind, shape = type(module).__name__, list(module.weight.shape)
    what = f"{name} ({kind} {shape}) cannot be held in NF4"
    return UserError(what, where="method.kind: qlora", fix="kind: lora")
