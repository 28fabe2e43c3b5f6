"""The blocks that engines shard by."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from dtrain.engines.base import decoder_layers

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 32,
}


def test_a_block_never_holds_the_embeddings() -> None:
    """BERT names its embeddings among what must not be split, and ties them to its head."""
    with torch.device("meta"):
        bert = BertLMHeadModel(BertConfig(is_decoder=True, **SIZES))
        llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert [type(block).__name__ for block in decoder_layers(bert)] == ["BertLayer"] * 3
    assert [type(block).__name__ for block in decoder_layers(llama)] == ["LlamaDecoderLayer"] * 3
