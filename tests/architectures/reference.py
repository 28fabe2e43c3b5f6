"""The same numbers by plain transformers, PEFT and torch: each document alone.

Of dtrain it asks only which weights are not quantized, and which are routers and stay frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, BitsAndBytesConfig

from dtrain.models.expert_layers import expert_parameters, router_layers
from dtrain.models.meta_model import build_meta_model, linear_layers
from dtrain.models.quantize import nf4_layers

Batch = dict[str, Any]


def plain(folder: Path, dtype: str, *, quantized: bool = False) -> nn.Module:
    """The model by transformers alone, without dropout.

    Its attention is transformers' own choice (Falcon's eager adds its alibi twice), but eager where
    scores are capped, which sdpa leaves out.
    """
    torch_dtype = getattr(torch, dtype)
    config = AutoConfig.from_pretrained(folder)
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch_dtype,
        bnb_4bit_compute_dtype=torch_dtype,
        llm_int8_skip_modules=spared(folder) if quantized else None,
    )
    model: nn.Module = models.auto_class(config.model_type).from_pretrained(
        folder,
        dtype=torch_dtype,
        attn_implementation="eager" if is_capped else None,
        quantization_config=nf4 if quantized else None,
        device_map={"": "cpu"} if quantized else None,
    )
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, Linear4bit):  # else some CPUs repack it in evaluation, and round more
            module.support_avx512bf16_for_cpu = False
    if quantized:
        round_experts(model, folder)
    return model.eval()


def spared(folder: Path) -> list[str]:
    """The linear layers that are not quantized."""
    described = build_meta_model(AutoConfig.from_pretrained(folder))
    return sorted(linear_layers(described).keys() - nf4_layers(described))


def round_experts(model: nn.Module, folder: Path) -> None:
    """Round experts, which transformers leaves in 16 bits, to NF4: each stored matrix by itself."""
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    for name, p in expert_parameters(model).items():
        apart = "gate_up" in name and any(".experts.0." in x for x in stored)
        for expert in p.data:
            for matrix in expert.chunk(2 if apart else 1):
                packed, state = quantize_4bit(
                    matrix.contiguous(), compress_statistics=True, quant_type="nf4"
                )
                matrix.copy_(dequantize_4bit(packed, state))


def adapted(folder: Path, adapter: Path, dtype: str, *, quantized: bool = False) -> nn.Module:
    """The model with an adapter, by PEFT."""
    base: Any = plain(folder, dtype, quantized=quantized)
    # what computes a trainable prompt is not saved
    trains = not PeftConfig.from_pretrained(adapter).is_prompt_learning
    return PeftModel.from_pretrained(
        base, adapter, is_trainable=trains, autocast_adapter_dtype=True
    )


def key_differences(model: nn.Module, adapter: Path) -> list[str]:
    """Names that only PEFT or only the file has."""
    stored = load_file(adapter / "adapter_model.safetensors").keys()
    return sorted(set(get_peft_model_state_dict(model)) ^ set(stored))


def documents(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each document's ids [n], the places of its targets, those targets, their losses by dtrain."""
    start = 0
    for length in batch["documents"]:
        inside = (batch["target_positions"] >= start) & (batch["target_positions"] < start + length)
        positions = batch["target_positions"][inside] - start
        ids = batch["ids"][start : start + length]
        yield ids, positions, batch["targets"][inside], batch["losses"][inside]
        start += length


def forget_longest(model: nn.Module) -> None:
    """Let no document be computed by the frequencies of a longer one before it (dynamic NTK)."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.clone()


def losses_alone(model: nn.Module, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of a document's targets, in float32."""
    forget_longest(model)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return cross_entropy(logits[positions].float(), targets, reduction="none")


def step_differences(model: nn.Module, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """How far the observed step is from the same documents alone.

    Returns:
        losses: greatest difference of a target's loss, relative to the greatest loss (at least 1);
        gradients: greatest difference of an element, relative to the greatest element;
        packed: most documents of a micro-batch; idle: adapters whose B has no gradient.
    """
    weights, gradients = ranks[0]["weights"], ranks[0]["gradients"]
    trainable = {
        name: p for name, p in model.named_parameters() if p.requires_grad or name in weights
    }
    with torch.no_grad():
        for name, value in weights.items():
            trainable[name].copy_(value)
            trainable[name].requires_grad_(True)
    batches = [batch for rank in ranks for batch in rank["steps"][-1]]
    learned = sum(len(batch["targets"]) for batch in batches)
    worst, scale, packed = 0.0, 1.0, 0
    for batch in batches:
        packed = max(packed, len(batch["documents"]))
        for ids, positions, targets, document_losses in documents(batch):
            if not len(targets):
                continue
            losses = losses_alone(model, ids, positions, targets)
            (losses.sum() / learned).backward()
            worst = max(worst, float((losses.detach() - document_losses).abs().max()))
            scale = max(scale, float(losses.detach().abs().max()))
    far, largest = 0.0, 0.0
    for name, gradient in gradients.items():
        expected = trainable[name].grad
        expected = torch.zeros_like(gradient) if expected is None else expected
        far = max(far, float((gradient - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    idle = sum(
        name not in gradients or not gradients[name].any() for name in weights if "lora_B" in name
    )
    return {
        "losses": worst / scale,
        "gradients": far / max(largest, 1e-12),
        "packed": packed,
        "idle": idle,
    }


def unadapted_experts(model: nn.Module) -> list[str]:
    """Matrices of experts that the model computes with and no adapter reaches."""
    return [
        name
        for name, p in model.named_parameters()
        if p.dim() >= 2 and ".experts." in name and not re.search("lora_|base_layer", name)
    ]


@torch.no_grad()
def output_difference(left: nn.Module, right: nn.Module, texts: list[Tensor]) -> float:
    """Greatest difference of two models' logits, relative to the greatest logit (at least 1)."""
    left.eval(), right.eval()  # a stage has dropout
    worst, scale = 0.0, 1.0
    for ids in texts:
        forget_longest(left)
        forget_longest(right)
        first = left(input_ids=ids[None], use_cache=False).logits.float()
        second = right(input_ids=ids[None], use_cache=False).logits.float()
        worst = max(worst, float((first - second).abs().max()))
        scale = max(scale, float(first.abs().max()))
    return worst / scale if math.isfinite(worst) else math.inf


@torch.no_grad()
def sees_later_tokens(model: nn.Module, ids: Tensor) -> float:
    """How far the first logits move when the last token changes; nothing in a causal model."""
    changed = ids.clone()
    changed[-1] = changed[-1] % 100 + 20
    first, second = (
        model(input_ids=x[None], use_cache=False).logits[0, :-1] for x in (ids, changed)
    )
    return float((first - second).abs().max())


def full_losses(
    model: nn.Module, ranks: list[dict[str, Any]], records: list[dict[str, Any]]
) -> list[float]:
    """Losses of full fine-tuning by torch's AdamW, on each document alone; routers stay frozen."""
    model.requires_grad_(True)
    for name in router_layers(model):
        model.get_submodule(name).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    losses = []
    for number, record in enumerate(records):
        batches = [batch for rank in ranks for batch in rank["steps"][number]]
        learned, total = sum(len(batch["targets"]) for batch in batches), 0.0
        for batch in batches:
            for ids, positions, targets, _ in documents(batch):
                loss = losses_alone(model, ids, positions, targets).sum() / learned
                loss.backward()
                total += float(loss.detach())
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = record["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
    return losses
