"""Tiny random models of every causal-LM type of the installed transformers.

A config class is instantiated with its own defaults shrunk by name: what every type calls a hidden
size becomes 64, a number of layers 4, and so on, in nested configs too. CORRECTIONS holds what no
rule can know, each with its reason. A case is a type and a variant: `llama`, `llama+tied`,
`llama@bfloat16`, `llama%eager`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from dtrain.samples.tiny_llama import build_tokenizer, quiet_transformers

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 64, 4, 2, 16
LAYERS, SHARED_LAYERS = 2, 2  # those that share keys come on top
# A token that no indexer head likes has a score of exactly 0: with 4 heads, one token in 16. Which
# of them is chosen depends on its place in the sequence, in float64 too.
INDEX_HEADS = 32
VOCABULARY, POSITIONS, WINDOW = 512, 512, 24
PAD, BOS, EOS = 0, 1, 3  # of dtrain's tiny tokenizer
SEED = 20261130

# Values by the names that configs use; the first pattern that matches a whole name counts.
RULES: list[tuple[str, int]] = [
    (r"pad_token_id", PAD),
    (r"bos_token_id|decoder_start_token_id|cls_token_id", BOS),
    (r"eos_token_id|sep_token_id|eod_token_id|forced_eos_token_id", EOS),
    (r"([a-z]+_)*vocab_size(_per_layer_input)?", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length"
     r"|max_(source|target)_positions", POSITIONS),
    (r"sliding_window(_size)?|window_size|local_attention|attention_window_size"
     r"|attention_chunk_size", WINDOW),
    (r"num_(de|en)coder_layers|(de|en)coder_layers|num_blocks|num_mem_blocks", LAYERS),
    (r"max_window_layers", 1),
    (r"(swa_|sliding_)?num_attention_heads|n_heads?|num_heads|num_(de|en)coder_attention_heads"
     r"|(de|en)coder_attention_heads|attention_heads", HEADS),
    (r"(swa_|num_global_)?(num_)?key_value_heads|num_kv_heads|swa_num_key_value_heads", KV_HEADS),
    (r"(swa_|global_|attention_)?head_dim|attention_head_size|head_size|v_head_dim|d_head"
     r"|qk_nope_head_dim|kv_channels|linear_(key|value|)_?head_dim|mamba_d_head|mamba_head_dim"
     r"|mamba_headdim|dim_head", HEAD_SIZE),
    (r"qk_rope_head_dim|rotary_dim", HEAD_SIZE // 2),
    (r"hidden_size|d_model|n_embd|embedding_dim|emb_dim|embedding_size|word_embed_proj_dim"
     r"|lru_width|attention_hidden_size|(input|output)_embedding_size|backbone_hidden_size"
     r"|cross_attention_hidden_size|dim_model_base|projection_dim|out_hidden_size", HIDDEN),
    (r"moe_intermediate_size|shared_expert_intermediate_size|expert_ffn_hidden_size"
     r"|shared_intermediate_size|moe_shared_expert_intermediate_size", HIDDEN // 2),
    (r"intermediate_size(_mlp)?|ffn_dim|(de|en)coder_ffn_dim|dff|dim_ff|ffn_hidden_size"
     r"|feed_forward_size|(prefix_)?dense_intermediate_size|d_inner|mamba_d_ssm|block_ffn_dim",
     2 * HIDDEN),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|hidden_size_per_layer_input", HIDDEN // 2),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"zero_expert_num", 2),
    (r"num_experts_per_tok(en)?|moe_topk|top_k_experts|moe_k|expert_selection_top_k", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts"
     r"|first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_mtp_layers"
     r"|(mamba_)?n_?groups", 1),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_d_conv_state", 16),
    (r"linear_num_(key|value)?_?heads", HEADS),
    (r"index(er)?_n_heads", INDEX_HEADS),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 2 * HIDDEN // HEAD_SIZE),
    (r"num_kv_shared_layers", SHARED_LAYERS),
    (r"index_head_dim|indexer_head_dim", HEAD_SIZE),
    (r"index_topk|indexer_budget", 64),
    (r"index_block_size|index_kpool", 16),
    (r"index_topk_blocks", 4),
    (r"image_size", 32),
    (r"patch_size", 16),
    (r"(mamba_)?chunk_size(_size)?", 16),
]  # fmt: skip
# Where a config leaves a size open, what is derived from it is derived before it shrinks.
WHERE_NONE = {
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TOKEN_KEYS = re.compile(r".*(_token_id|_token_index|_index|_id)$")

INDEXER = {
    "indexer_n_heads": INDEX_HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_SIZE,
    "indexer_budget": 64, "indexer_compress_ratio": 4, "ngram_vocab_size_base": VOCABULARY,
}  # fmt: skip
THREE_PARTS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# What shrinking by name cannot know.
CORRECTIONS: dict[str, dict[str, Any]] = {
    # A vocabulary of bytes is smaller than dtrain's tokenizer.
    "blt": {
        "vocab_size": VOCABULARY,
        "encoder_hash_byte_group_vocab": VOCABULARY,
        "patcher_config": {"vocab_size": VOCABULARY},
        "encoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": HIDDEN},
        "decoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": HIDDEN},
    },
    # Its defaults have no rope for the kinds of its own layers.
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    # Its default attention lacks what its own model reads.
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": KV_HEADS, "clip_qkv": 8.0}},
    # A head is the sum of two parts.
    "dots3_note_text": {"head_dim": HEAD_SIZE + HEAD_SIZE // 2},
    # Its defaults have no layer types.
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    # By default no layer chooses tokens.
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    # `num_heads` are those of its states.
    "mamba2": {"num_heads": 2 * HIDDEN // HEAD_SIZE},
    # The three parts of a rotation fill a head.
    **{
        kind: {"text_config": {"rope_parameters": THREE_PARTS}}
        for kind in ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    },
    # The tower of the first has names of its own.
    "qwen2_vl": {
        "text_config": {"rope_parameters": THREE_PARTS},
        "vision_config": {"embed_dim": HIDDEN, "depth": LAYERS},
    },
    "glm4v": {"text_config": {"rope_parameters": THREE_PARTS}},
    # The indexer has no default sizes.
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    # It is an encoder by default, of whole chunks.
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    # By default it has no tower.
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    # A language chooses among its layers.
    "xmod": {"default_language": "en_XX"},
    # Its attention reads two hidden states at once.
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_SIZE},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_SIZE},
}

# Other forms of a type: keys of its config.
VARIANTS: dict[str, dict[str, Any]] = {
    "bert+decoder": {"is_decoder": True},
    "roberta+decoder": {"is_decoder": True},
    "cohere+qk": {"use_qk_norm": True},
    "falcon+alibi": {"alibi": True},
    "falcon+new": {"new_decoder_architecture": True},
    "gemma4_text+moe": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": HIDDEN // 2,
    },
    "gemma4_text+noper": {"hidden_size_per_layer_input": 0},
    "gemma4_text+shared": {
        "num_kv_shared_layers": SHARED_LAYERS, "num_hidden_layers": LAYERS + SHARED_LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neox+serial": {"use_parallel_residual": False},
    "llama+bias": {"attention_bias": True, "mlp_bias": True},
    "llama+dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        "max_position_embeddings": 32,
    },
    "llama+llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        }
    },
    "llama+tied": {"tie_word_embeddings": True},
    "llama+yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
    "mistral+window": {"sliding_window": WINDOW},
    "olmo+clip": {"clip_qkv": 1.0},
    "opt+projected": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi3+longrope": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [1.0 + i for i in range(8)],
            "original_max_position_embeddings": 32,
        },
    },
    "phi3+partial": {"partial_rotary_factor": 0.5},
    "phi3+window": {"sliding_window": WINDOW},
    "qwen2+window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "stablelm+norm": {"qk_layernorm": True, "use_parallel_residual": True},
    "starcoder2+window": {"sliding_window": WINDOW},
}  # fmt: skip
# Multimodal types without a class for text alone.
WRAPPERS = [
    "glm4v", "internvl", "kimi_k25", "llava", "llava_next", "mistral3", "qwen2_5_vl", "qwen2_vl",
    "qwen3_vl", "qwen3_vl_moe", "smolvlm",
]  # fmt: skip
PRECISIONS = ["gemma3_text", "gemma4_text", "gpt2", "llama", "phi3", "qwen3"]
ATTENTIONS = ["gpt2%eager", "llama%eager", "llama%sdpa"]


@dataclass(frozen=True)
class Case:
    """A type of model, a variant of its config, and how the recipe computes it.

    Attributes:
        name: `type[+variant][@dtype][%attention]`.
    """

    name: str

    @property
    def model_type(self) -> str:
        return re.split(r"[+@%]", self.name)[0]

    @property
    def config_name(self) -> str:
        """Type and variant."""
        return re.split(r"[@%]", self.name)[0]

    @property
    def dtype(self) -> str:
        return self._after("@", "float32")

    @property
    def attention(self) -> str:
        return self._after("%", "auto")

    def _after(self, prefix: str, default: str) -> str:
        match = re.search(f"{prefix}([a-z0-9_]+)", self.name)
        return match.group(1) if match else default


def all_cases() -> list[Case]:
    """Every type of the installed transformers, the wrappers and variants of this file."""
    names = [*{*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS}, *VARIANTS, *ATTENTIONS]
    names += [f"{name}@bfloat16" for name in PRECISIONS]
    return [Case(name) for name in sorted(names)]


def auto_class(kind: str) -> Any:
    """The auto class of the whole model, which of a wrapper has all towers."""
    is_wrapper = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return AutoModelForMultimodalLM if is_wrapper else AutoModelForCausalLM


def tiny_config(case: Case) -> PretrainedConfig:
    """The config of a case, small enough for a second's training."""
    kind = CONFIG_MAPPING[case.model_type]
    settings = merged(_shrunk(kind().to_dict()), CORRECTIONS.get(case.model_type, {}))
    return kind(**merged(settings, VARIANTS.get(case.config_name, {})))


def merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`settings` with the keys of `more`, which reach into nested configs."""
    result = dict(settings)
    for key, value in more.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested and key != "rope_parameters" else value
    return result


def _shrunk(content: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config that shrink, with their new values."""
    layers, shares = _layer_count(content), bool(content.get("num_kv_shared_layers"))
    few = LAYERS + SHARED_LAYERS * shares
    result: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key.endswith("_config"):
            kind = {"model_type": value["model_type"]} if value.get("model_type") else {}
            result[key] = _shrunk(value) | kind
        elif isinstance(value, list) and len(value) == layers and layers > few:
            result[key] = [_small_or_same(key, item) for item in _covering(value, few)]
        elif isinstance(value, int) and not isinstance(value, bool):
            small = few if key in LAYER_COUNTS and value > few else _small(key, value)
            if small is not None:
                result[key] = small
        elif value is None and key in WHERE_NONE:
            result[key] = WHERE_NONE[key]
    if "kv_lora_rank" in content:  # latent attention: a key for each query, a small rotated part
        head_settings = {"num_key_value_heads": HEADS, "head_dim": HEAD_SIZE // 2}
        result |= {key: value for key, value in head_settings.items() if key in content}
    return result


def _small(key: str, value: int) -> int | None:
    for pattern, small in RULES:
        if re.fullmatch(pattern, key):
            return small if value > small or key.endswith("token_id") else None
    if TOKEN_KEYS.fullmatch(key) and value >= VOCABULARY:
        return VOCABULARY - 12 + sum(map(ord, key)) % 12
    return None


def _small_or_same(key: str, value: Any) -> Any:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    small = _small(key, value) if is_int else None
    return value if small is None else small


def _layer_count(content: dict[str, Any]) -> int:
    return next((int(content[key]) for key in LAYER_COUNTS if content.get(key)), -1)


def _covering(values: list[Any], count: int) -> list[Any]:
    """Some of the values that a config has for each layer: each kind of them in turn."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return (kinds * count)[:count]


def build(case: Case) -> nn.Module:
    """A model whose weights are large enough that a wrong attention or scale shows."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        config = tiny_config(case)
        model: nn.Module = auto_class(case.model_type).from_config(config).float().eval()
        randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Matrices keep the size of what passes through them, the rest leaves its initial value."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            parameter.normal_(0.0, 0.5)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    for module in model.modules():
        # Youtu's code zeroes this row whenever transformers loads it, whatever the file says.
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.0
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.mul_(torch.empty_like(buffer).uniform_(0.7, 1.3))


def write(case: Case, folder: Path) -> None:
    """Write the case's model and dtrain's tiny tokenizer into `folder`.

    A model that cannot be built leaves its config alone: it may be refused by that.
    """
    with quiet_transformers():
        build_tokenizer().save_pretrained(folder)
        tiny_config(case).save_pretrained(folder)
        build(case).save_pretrained(folder)
