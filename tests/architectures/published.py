"""Published sizes of the families of mixtures of experts and hybrids, as in their config.json.

A value that is not here is what transformers assumes, which is that of the published model.
"""

from __future__ import annotations

from typing import Any


def _layers(kinds: dict[str, str], pattern: str) -> list[str]:
    return [kinds[letter] for letter in pattern]


_LFM = {"c": "conv", "a": "full_attention"}
_GRANITE = {"m": "mamba", "a": "attention"}
_NEMOTRON = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_QWEN_27B = {
    "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 24,
    "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 17408, "vocab_size": 248320,
    "linear_num_value_heads": 48, "linear_num_key_heads": 16,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-Next-80B-A3B": {"model_type": "qwen3_next"},
    "Qwen3.5-27B": {"model_type": "qwen3_5_text"} | _QWEN_27B,
    "Qwen3.5-27B with its tower": {"model_type": "qwen3_5", "text_config": _QWEN_27B},
    "Qwen3.5-35B-A3B": {"model_type": "qwen3_5_moe_text"},
    "Qwen3.5-35B-A3B with its tower": {"model_type": "qwen3_5_moe"},
    "GLM-4.7-Flash": {"model_type": "glm4_moe_lite"},
    "Gemma-4-31B": {
        "model_type": "gemma4_text", "hidden_size": 5376, "num_hidden_layers": 60,
        "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
        "head_dim": 256, "global_head_dim": 512, "intermediate_size": 21504,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "vocab_size": 262144,
    },
    "Gemma-4-26B-A4B": {
        "model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "head_dim": 256, "global_head_dim": 512, "intermediate_size": 2112,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "vocab_size": 262144,
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "Mistral-Small-3.2-24B with its tower": {
        "model_type": "mistral3", "tie_word_embeddings": False, "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "intermediate_size": 32768, "vocab_size": 131072,
        },
    },
    "Llama-4-Scout-17B-16E": {"model_type": "llama4_text"},
    "Llama-4-Scout-17B-16E with its tower": {"model_type": "llama4"},
    "Nemotron-3-Nano-30B-A3B": {
        "model_type": "nemotron_h", "hidden_size": 2688, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "hybrid_override_pattern": _NEMOTRON,
        "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
        "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "intermediate_size": 1856,
        "vocab_size": 131072,
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "vocab_size": 102400,
    },
    "Mixtral-8x22B": {
        "model_type": "mixtral", "hidden_size": 6144, "num_hidden_layers": 56,
        "num_attention_heads": 48, "num_key_value_heads": 8, "intermediate_size": 16384,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32768,
    },
    "LFM2-2.6B": {
        "model_type": "lfm2", "hidden_size": 2048, "num_hidden_layers": 30,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 10752,
        "vocab_size": 65536, "block_auto_adjust_ff_dim": False,
        "layer_types": _layers(_LFM, "ccaccacccacccacccacccacacacccc"),
    },
    "LFM2-8B-A1B": {
        "model_type": "lfm2_moe", "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 7168,
        "moe_intermediate_size": 1792, "num_experts": 32, "num_experts_per_tok": 4,
        "num_dense_layers": 2, "vocab_size": 65536,
        "layer_types": _layers(_LFM, "ccacccacccacccacccaccacc"),
    },
    "Granite-4.0-H-Small": {
        "model_type": "granitemoehybrid", "hidden_size": 4096, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 768,
        "shared_intermediate_size": 1536, "num_local_experts": 72, "num_experts_per_tok": 10,
        "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
        "vocab_size": 100352, "tie_word_embeddings": True, "position_embedding_type": "nope",
        "layer_types": _layers(_GRANITE, "mmmmmammmm" * 4),
    },
}  # fmt: skip
