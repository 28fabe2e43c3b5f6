"""The blocks that engines shard by."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from dtrain.core.errors import UserError
from dtrain.engines.fsdp2 import check_blocks
from dtrain.models.decoder_layers import decoder_layers

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 32,
}


def test_decoder_layers_exclude_the_embeddings() -> None:
    """BERT names its embeddings among what must not be split, and ties them to its head."""
    with torch.device("meta"):
        bert = BertLMHeadModel(BertConfig(is_decoder=True, **SIZES))
        llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert [type(block).__name__ for block in decoder_layers(bert)] == ["BertLayer"] * 3
    assert [type(block).__name__ for block in decoder_layers(llama)] == ["LlamaDecoderLayer"] * 3


def test_outermost_nested_layers_are_used_and_shared_weights_are_refused() -> None:
    """Zamba 2's hybrid layers hold a Mamba layer each, and one attention between them."""
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
    with torch.device("meta"):
        model = Zamba2ForCausalLM(
            Zamba2Config(
                **SIZES | {"num_hidden_layers": 4}, layers_block_type=kinds, mamba_headdim=8,
                n_mamba_heads=4, num_key_value_heads=2, num_mem_blocks=1,
            )
        )  # fmt: skip
    blocks = decoder_layers(model)
    assert [type(block).__name__ for block in blocks] == [
        "Zamba2MambaDecoderLayer",
        "Zamba2HybridLayer",
    ] * 2
    with pytest.raises(UserError, match="share weights"):
        check_blocks(blocks)
    check_blocks(blocks[:2])
