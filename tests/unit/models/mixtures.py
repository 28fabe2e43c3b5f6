"""Small mixtures of experts, with adapters or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config import schema
from dtrain.config.methods import Lora
from dtrain.methods.base import build_method
from dtrain.models.sharded_loading import stream_base

CPU = torch.device("cpu")
EXPERTS = 4
COMMON: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip
# Stored apart and joined; with names of their own; with experts that all tokens get; whole, the
# other way round, with biases; whole, with code of their own.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {
        "num_experts": EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
    },
    "gpt_oss": {
        "num_local_experts": EXPERTS, "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "llama4_text": {
        "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size": 16,
        "intermediate_size_mlp": 48, "attention_chunk_size": 8, "pad_token_id": 0,
    },
}  # fmt: skip
# A router that is a linear layer; one whose choices have a bias.
OTHERS: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2},
    "glm4_moe": {
        "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
        "moe_intermediate_size": 16,
    },
    # Routers that are a matrix and scales, or one and a bias; that choose one more than experts.
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2,
        "moe_intermediate_size": 16, "hidden_size_per_layer_input": 0, "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 16,
        "moe_layer_start_index": 0, "moe_layer_interval": 1,
    },
    "zaya": {
        "num_experts": EXPERTS, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "router_hidden_size": 12, "layer_types": ["hybrid", "hybrid"],
    },
}  # fmt: skip
IDS = torch.arange(3, 23)[None]


def write_mixture(parent: Path, kind: str, **changes: Any) -> Path:
    """The folder of a small random model, in `parent`."""
    config = AutoConfig.for_model(kind, **{**COMMON, **(MODELS | OTHERS)[kind], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = parent / f"{kind}{len(list(parent.iterdir()))}"
    model.save_pretrained(folder)
    return folder


def streamed(folder: Path, *, quantized: bool = False) -> Any:
    settings = schema.Model(base=str(folder))
    base = stream_base(folder, settings, quantized=quantized, dtype=torch.float32, device=CPU)
    return base


def adapted(folder: Path, *, quantized: bool = False, **keys: Any) -> tuple[Any, PeftModel]:
    """A method, and the model that it makes, with values in B that matter."""
    keys = {"kind": "qlora" if quantized else "lora", "r": 4, "dropout": 0.0} | keys
    method = build_method(Lora(**keys))
    base = streamed(folder, quantized=quantized)
    model: Any = method.attach(base.model, seed=1, device=CPU)
    base.materialize(model)
    method.on_weights_loaded(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return method, model


def saved(method: Any, model: Any, folder: Path) -> Path:
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    method.save(folder, model, tensors)
    return folder


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits[0]
