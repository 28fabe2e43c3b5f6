"""The packing probe agrees with the model in plain transformers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from dtrain.config import schema
from dtrain.core.errors import UserError
from dtrain.models.load import read_config, resolve_attention
from dtrain.models.loss import target_logits
from dtrain.models.packing_probe import ProbeSequence, probe_packing

CPU = torch.device("cpu")
SETTINGS = schema.Model(base="unused")
LENGTHS = (7, 45, 1, 30)
HIDDEN = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = HIDDEN | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_expand": 2}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [float(n) for n in range(2, 6)]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LATENT = SMALL | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "index_head_dim": 16,
    "moe_intermediate_size": 16, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# It chooses blocks by their places in the sequence, of documents that are longer than the probe's.
BLOCKS = SMALL | {
    "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "index_n_heads": 2,
    "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2,
    "layer_types": ["full_attention", "minimax_m3_sparse"],
}  # fmt: skip
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "qwen3": ("qwen3", SMALL | {"head_dim": 8}),
    "mistral with a window": ("mistral", SMALL | {"sliding_window": 6}),
    "gemma2": ("gemma2", SMALL | {"head_dim": 8, "sliding_window": 6}),
    "gemma3_text": ("gemma3_text", SMALL | {"head_dim": 8, "sliding_window": 6}),
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "codegen": ("codegen", GPT | {"rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {
        "vocab_size": 256, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128,
    }),
    "phi3 with longrope": ("phi3", SMALL | {
        "rope_parameters": LONG, "original_max_position_embeddings": 16, "pad_token_id": 0,
        "max_position_embeddings": 128,
    }),
    "llama with dynamic rope": ("llama", SMALL | {
        "rope_parameters": DYNAMIC, "max_position_embeddings": 16,
    }),
    "deepseek_v32": ("deepseek_v32", LATENT | {"index_topk": 16, "n_routed_experts": 2}),
    "opt": ("opt", HIDDEN | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bert": ("bert", HIDDEN | {"intermediate_size": 48, "is_decoder": True}),
}  # fmt: skip
LIGHTNING = SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
# Of these dtrain computes layers one document at a time.
WITH_STATE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": ("qwen3_5_text", SMALL | DELTA | {"head_dim": 8}),
    "lfm2": ("lfm2", SMALL | {
        "block_ff_dim": 48, "block_multiple_of": 16, "layer_types": ["conv", "full_attention"],
    }),
    "bamba": ("bamba", SMALL | MAMBA | {"attn_layer_indices": [1]}),
    "granitemoehybrid, dense": ("granitemoehybrid", SMALL | MAMBA | {
        "num_local_experts": 0, "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
    }),
    "mamba": ("mamba", {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2}),
    "recurrent_gemma": ("recurrent_gemma", HIDDEN | {
        "intermediate_size": 96, "lru_width": 32, "attention_window_size": 6,
    }),
}  # fmt: skip
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("falcon", HIDDEN | {"multi_query": True}),
    "falcon with alibi": ("falcon", HIDDEN | {"alibi": True}),
    "bloom": ("bloom", {"vocab_size": 256, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"vocab_size": 256, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "biogpt": ("biogpt", HIDDEN | {"intermediate_size": 48}),
    "xglm": ("xglm", {
        "vocab_size": 256, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
    }),
    "minimax_m3_vl_text": ("minimax_m3_vl_text", BLOCKS),
    "roberta": ("roberta", HIDDEN | {"intermediate_size": 48, "is_decoder": True}),
}  # fmt: skip


def configured(kind: str, values: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **values)


def build_model(config: PretrainedConfig) -> PreTrainedModel:
    """As transformers makes it, with weights that let what leaks through show."""
    attention = resolve_attention("auto", config, CPU, torch.float32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


@torch.no_grad()
def packing_effect(model: PreTrainedModel) -> float:
    """How much packing changes the logits, relative to the largest one."""
    documents = [torch.randint(3, 256, (n,)) for n in LENGTHS]
    alone = [model(input_ids=d[None], use_cache=False).logits[0] for d in documents]
    try:
        packed = target_logits(model, ProbeSequence.of(documents))
    except Exception:
        return float("inf")
    expected = torch.cat(alone)
    return float((packed - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", PACKED)
def test_models_that_separate_documents_are_packed(name: str) -> None:
    config = configured(*PACKED[name])
    assert probe_packing(config, SETTINGS).packed
    if "rope" not in name:  # plain transformers mixes those; see test_rope.py
        assert packing_effect(build_model(config)) < 1e-4


@pytest.mark.parametrize("name", WITH_STATE)
def test_models_whose_layers_have_a_state_are_packed(name: str) -> None:
    config = configured(*WITH_STATE[name])
    assert probe_packing(config, SETTINGS).packed
    assert packing_effect(build_model(config)) > 1e-3


@pytest.mark.parametrize("name", ALONE)
def test_models_that_mix_documents_are_not_packed(name: str) -> None:
    config = configured(*ALONE[name])
    layout = probe_packing(config, SETTINGS)
    assert not layout.packed
    assert layout.reason
    assert packing_effect(build_model(config)) > 1e-3


def test_new_tokens_that_the_model_cannot_read_are_refused() -> None:
    layers = {"head_dim": 8, "hidden_size_per_layer_input": 8}
    rows = {"vocab_size": 2000, "vocab_size_per_layer_input": 1500}
    config = configured("gemma4_text", SMALL | layers | rows)
    assert probe_packing(config, SETTINGS, [1400, 1499]).packed
    with pytest.raises(UserError, match="its code fails: index out of range"):
        probe_packing(config, SETTINGS, [1400, 1999])


def test_probe_uses_the_recipes_attention() -> None:
    config = configured(*PACKED["llama"])
    for attention in ("sdpa", "eager"):
        assert probe_packing(config, SETTINGS.model_copy(update={"attention": attention})).packed


def test_probing_a_70b_model_needs_little_memory() -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131072,
    )  # fmt: skip
    started = time.process_time()
    assert probe_packing(config, SETTINGS).packed
    assert time.process_time() - started < 60  # in full widths it takes minutes and 280 GB


def test_late_layer_of_another_kind_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.models.load.separate_states", lambda model: None)
    kinds = ["full_attention"] * 11 + ["linear_attention"]
    values = LIGHTNING | {"num_hidden_layers": 12, "layer_types": kinds}
    assert not probe_packing(configured("minimax", values), SETTINGS).packed


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_noncausal_model_is_refused(kind: str) -> None:
    config = configured(kind, HIDDEN | {"intermediate_size": 48, "is_decoder": False})
    with pytest.raises(UserError, match="predictions depend on tokens that follow"):
        probe_packing(config, SETTINGS)


class OddConfig(LlamaConfig):
    model_type = "odd"


class Odd(LlamaForCausalLM):
    """Does one odd act in each forward pass."""

    config_class = OddConfig

    def forward(self, *args: Any, **more: Any) -> Any:
        if self.config.act == "fail":
            raise ValueError("no such kernel\nmore lines")
        output = super().forward(*args, **more)
        output.logits = output.logits + torch.rand(())
        return output


@pytest.mark.parametrize(
    ("act", "why"), [("fail", "its code fails: no such kernel"), ("draw", "it computes at random")]
)
def test_failing_model_code_is_refused_with_the_reason(act: str, why: str) -> None:
    AutoModelForCausalLM.register(OddConfig, Odd, exist_ok=True)
    with pytest.raises(UserError) as e:
        probe_packing(OddConfig(**SMALL, act=act), SETTINGS)
    assert e.value.message == f"'odd' cannot be trained: {why}"


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    configured("bart", {"d_model": 32}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'bart' is an encoder-decoder model"):
        read_config(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "codegen", "bloom", "mpt", "xglm"])
def test_model_without_sdpa_uses_eager(name: str) -> None:
    config = configured(*(PACKED | ALONE)[name])
    assert resolve_attention("auto", config, CPU, torch.float32) == "eager"
    with pytest.raises(UserError, match="has no attention 'sdpa'") as refused:
        resolve_attention("sdpa", config, CPU, torch.float32)
    assert refused.value.where == "model.attention"
    assert "eager" in refused.value.fix


SINKS = SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
PALIGEMMA = {
    "text_config": SMALL | {"model_type": "gemma2", "head_dim": 8},
    "vision_config": SMALL | {"image_size": 28, "patch_size": 14}, "projection_dim": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "values", "attention"),
    [
        ("llama", SMALL, "documents"),
        ("gpt_oss", SINKS, "documents"),
        ("deepseek_v32", PACKED["deepseek_v32"][1], "sdpa"),
        ("minimax_m3_vl_text", BLOCKS, "sdpa"),
        ("paligemma", PALIGEMMA, "eager"),
    ],
)
def test_models_that_choose_tokens_or_compute_with_their_mask_get_one(
    kind: str, values: dict[str, Any], attention: str
) -> None:
    """What a model passes to its attention says so, and no name."""
    assert resolve_attention("auto", configured(kind, values), CPU, torch.float32) == attention


def test_flash_attention_is_for_models_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.models.load.is_flash_attn_2_available", lambda: True)
    gpu = torch.device("cuda")
    chosen = [
        resolve_attention("auto", configured(*(PACKED | ALONE)[name]), gpu, torch.bfloat16)
        for name in ("llama", "mpt")
    ]
    assert chosen == ["flash_attention_2", "eager"]
    with pytest.raises(UserError, match="has no attention 'flash_attention_2'"):
        config = configured(*ALONE["mpt"])
        resolve_attention("flash_attention_2", config, gpu, torch.bfloat16)


def test_flash_attention_is_not_for_heads_of_more_than_256(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.models.load.is_flash_attn_2_available", lambda: True)
    gpu, sizes = torch.device("cuda"), {"head_dim": 8, "hidden_size_per_layer_input": 0}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    for largest, chosen in ((256, "flash_attention_2"), (512, "documents")):
        config = configured("gemma4_text", SMALL | sizes | layers | {"global_head_dim": largest})
        assert resolve_attention("auto", config, gpu, torch.bfloat16) == chosen
    with pytest.raises(UserError, match="heads of 512, and flash_attention_2 takes at most 256"):
        resolve_attention("flash_attention_2", config, gpu, torch.bfloat16)


def test_flash_attention_is_refused_where_it_is_not_installed() -> None:
    config = configured(*PACKED["llama"])
    with pytest.raises(UserError, match="needs a GPU and the package flash-attn") as refused:
        resolve_attention("flash_attention_2", config, CPU, torch.bfloat16)
    assert refused.value.where == "model.attention"
