"""NEFTune's noise: its distribution, and which forward passes have it."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config.methods import Lora
from dtrain.methods.base import build_method
from dtrain.models.attention import use_document_lengths
from dtrain.models.dropout import KeyedDropout, set_dropout_key
from dtrain.models.embedding_noise import add_embedding_noise

ALPHA, WIDTH = 5.0, 64
DOCUMENTS = {7: [30, 10], 8: [24]}  # lengths of the documents of each sequence


@pytest.fixture(scope="module")
def model() -> nn.Module:
    sizes = {"intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(hidden_size=WIDTH, vocab_size=32, **sizes))
    adapted = build_method(Lora(kind="lora", dropout=0.5)).attach(base, seed=0)
    add_embedding_noise(adapted, ALPHA)
    return adapted.train()


def noise(model: nn.Module, sequences: list[int], seed: int = 1, step: int = 2) -> Tensor:
    """What is added to the embeddings of these sequences, [T, h]."""
    lengths = [length for sequence in sequences for length in DOCUMENTS[sequence]]
    set_dropout_key(model, seed, step, sequences, [sum(DOCUMENTS[s]) for s in sequences])
    embeddings = model.get_input_embeddings()
    tokens = torch.arange(sum(lengths))[None] % 32
    with use_document_lengths(lengths):
        difference: Tensor = embeddings(tokens) - embeddings.weight[tokens]
    return difference[0].detach()


def test_noise_is_uniform_with_the_scale_of_its_document(model: nn.Module) -> None:
    parts = noise(model, [7, 8]).split([30, 10, 24])
    for part in parts:
        bound = ALPHA / sqrt(part.numel())
        assert 0.98 * bound < part.abs().max().item() <= bound * (1 + 1e-5)
        assert part.std().item() == pytest.approx(bound / sqrt(3), rel=0.1)
        assert part.mean().item() == pytest.approx(0.0, abs=0.1 * bound)


def test_noise_belongs_to_seed_step_and_sequence(model: nn.Module) -> None:
    both = noise(model, [7, 8])
    torch.rand(3)  # no other random number matters
    torch.testing.assert_close(both, torch.cat([noise(model, [7]), noise(model, [8])]))
    torch.testing.assert_close(noise(model, [8, 7]), torch.cat([both[40:], both[:40]]))
    assert not torch.equal(both, noise(model, [7, 8], step=3))
    assert not torch.equal(both, noise(model, [7, 8], seed=2))


def test_passes_that_do_not_train_have_no_noise(model: nn.Module) -> None:
    with torch.no_grad():  # a reference or a baseline, while the model is in training mode
        assert not noise(model, [7]).any()
    model.eval()
    assert not noise(model, [7]).any()
    model.train()
    assert noise(model, [7]).any()
    set_dropout_key(model, 1, 2, [], [])  # a rank without rows
    embeddings = model.get_input_embeddings()
    assert torch.equal(embeddings(torch.ones(1, 2, dtype=torch.int64))[0, 0], embeddings.weight[1])


def test_noise_and_dropout_share_one_key(model: nn.Module) -> None:
    keys = {id(m.key) for m in model.modules() if isinstance(m, KeyedDropout)}
    assert keys == {id(model.get_input_embeddings().noise.key)}
