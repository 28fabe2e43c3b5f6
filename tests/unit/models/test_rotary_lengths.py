"""Rotary frequencies that depend on a document's length do not depend on its row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel

from dtrain.config import schema
from dtrain.models.load import load_base
from dtrain.models.loss import target_logits
from dtrain.models.packing_probe import ProbeSequence
from dtrain.models.positions import document_lengths

ORIGINAL = 64
ROWS = [[100, 20, 50], [20, 64, 65], [50], [64, 100]]
SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CONFIGS = {
    "phi3, longrope": Phi3Config(
        **SMALL, rope_parameters=LONGROPE, max_position_embeddings=256,
        original_max_position_embeddings=ORIGINAL,
    ),
    "llama, dynamic": LlamaConfig(
        **SMALL, rope_parameters=DYNAMIC, max_position_embeddings=ORIGINAL
    ),
}  # fmt: skip


def base(name: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    settings = schema.Model(base=str(folder))
    return load_base(
        folder, settings, quantized=False, dtype=torch.float32, device=torch.device("cpu")
    )


@torch.no_grad()
def in_transformers(document: Tensor, folder: Path) -> Tensor:
    """Logits of a document alone, by a model that has computed nothing before."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits: Tensor = model(input_ids=document[None]).logits[0]
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rotations_equal_documents_alone(name: str, tmp_path: Path) -> None:
    model = base(name, tmp_path)
    for lengths in ROWS:
        documents = [torch.randint(256, (n,)) for n in lengths]
        expected = torch.cat([in_transformers(document, tmp_path) for document in documents])
        with torch.no_grad():
            logits = target_logits(model, ProbeSequence.of(documents))
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_is_unchanged(name: str, tmp_path: Path) -> None:
    model = base(name, tmp_path)
    ids = torch.randint(1, 256, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = [
        m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for m in (model, plain)
    ]
    assert torch.equal(*texts)


def test_lengths_from_position_ids() -> None:
    assert document_lengths(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]
    assert document_lengths(torch.tensor([[5]])) == [1]
    assert document_lengths(torch.tensor([[0, 1], [0, 1]])) == [2]
