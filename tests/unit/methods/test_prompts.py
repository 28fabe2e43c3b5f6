"""Virtual tokens: PEFT as oracle, document by document, for what is packed here."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from dtrain.config import schema
from dtrain.config.methods import parse_method
from dtrain.config.schema import Model
from dtrain.core.errors import UserError
from dtrain.methods.base import build_method
from dtrain.models.hub import base_folder
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import load_base
from dtrain.models.loss import target_losses
from dtrain.objectives.base import adapters_disabled
from dtrain.samples.make import ensure
from dtrain.serving.generator import TextGenerator
from dtrain.serving.run_models import ServedModel

TOKENS = 3
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}
PEFT = {
    "prompt": PromptTuningConfig(**COMMON),
    "p_tuning": PromptEncoderConfig(**COMMON, encoder_hidden_size=64),
    "prefix": PrefixTuningConfig(**COMMON),
}
LENGTHS = [5, 9, 1]


@dataclass
class Batch:
    """A packed micro-batch whose every next token is a target."""

    document_lengths: list[int] = field(default_factory=lambda: LENGTHS)

    def __post_init__(self) -> None:
        documents = [torch.arange(n) * 7 % 50 + n for n in self.document_lengths]
        inside = [torch.arange(n) < n - 1 for n in self.document_lengths]
        self.input_ids = torch.cat(documents).unsqueeze(0)
        self.position_ids = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
        self.target_positions = torch.cat(inside).nonzero()[:, 0]
        self.targets = torch.cat([document[1:] for document in documents])


@pytest.fixture
def base() -> Path:
    ensure("tiny-llama")
    return base_folder("dtrain:tiny-llama")


def attached(kind: str, base: Path, **options: Any) -> tuple[Any, nn.Module]:
    """Our model, loaded as for training."""
    settings = schema.Model(base="dtrain:tiny-llama", dtype="float32", **options)
    cpu = torch.device("cpu")
    model = load_base(base, settings, quantized=False, dtype=torch.float32, device=cpu)
    method = build_method(parse_method({"kind": kind, "virtual_tokens": TOKENS}))
    prompted = method.attach(model, seed=0)
    apply_kernels(prompted, settings)
    return method, prompted


def of_peft(kind: str, base: Path, ours: nn.Module) -> nn.Module:
    """PEFT's model with the same first values."""
    plain = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = get_peft_model(plain, PEFT[kind])
    values = {n.replace("encoder.", "encoder.default."): p for n, p in trained(ours).items()}
    assert values.keys() == trained(model).keys()
    for name, parameter in trained(model).items():
        parameter.data.copy_(values[name])
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def peft_losses(model: nn.Module) -> Tensor:
    """The loss of each target, each document alone."""
    batch, losses = Batch(), []
    for document in batch.input_ids.split(LENGTHS, dim=1):
        length = document.shape[1]
        logits = model(input_ids=document).logits[0, -length:]
        losses.append(nn.functional.cross_entropy(logits[:-1], document[0, 1:], reduction="none"))
    return torch.cat(losses)


def steps(model: nn.Module, total_loss: Any) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05)
    values = []
    for _ in range(5):
        loss = total_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"kernels": "off"}])
@pytest.mark.parametrize("kind", PEFT)
def test_packed_losses_are_those_of_peft(kind: str, options: dict, base: Path) -> None:
    _, ours = attached(kind, base, **options)
    theirs = of_peft(kind, base, ours)
    got = steps(ours, lambda: target_losses(ours, Batch())[0])
    assert got == pytest.approx(steps(theirs, lambda: peft_losses(theirs).sum()), rel=1e-5)
    assert got[-1] < got[0] - 0.1, "nothing was learned: the comparison would prove nothing"


def test_a_model_with_a_second_token_table_is_refused(base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    model.model.embed_tokens_per_layer = nn.Embedding(model.config.vocab_size - 9, 4)
    with pytest.raises(UserError, match=r"looks up tokens in model\.embed_tokens_per_layer too"):
        build_method(parse_method({"kind": "prompt"})).attach(model, seed=0)


@pytest.mark.parametrize("kind", PEFT)
def test_off_it_computes_the_base(kind: str, base: Path) -> None:
    _, model = attached(kind, base)
    plain = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad(), adapters_disabled(model):
        off = target_losses(model, Batch())[1]
    with torch.no_grad():
        on = target_losses(model, Batch())[1]
        expected = peft_losses(plain)
    assert torch.allclose(off, expected, atol=1e-5)
    assert not torch.allclose(on, expected, atol=1e-4)


@pytest.mark.parametrize("kind", PEFT)
def test_what_is_saved_is_served_and_loaded_by_peft(kind: str, base: Path, tmp_path: Path) -> None:
    method, model = attached(kind, base)
    steps(model, lambda: target_losses(model, Batch())[0])
    tensors = {name: p.detach() for name, p in trained(model).items()}
    saved = deepcopy(model)
    for parameter in saved.base_model.parameters():
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves the parts that other ranks have
    method.save(tmp_path / "adapter", saved, tensors, base=str(base))
    assert list(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == [
        "prompt_embeddings"
    ]
    with torch.no_grad():
        expected = target_losses(model, Batch())[1]
        plain = LlamaForCausalLM.from_pretrained(base)
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert torch.allclose(peft_losses(loaded), expected, atol=1e-5)
    served = ServedModel(str(base), adapters=(tmp_path / "adapter",))
    speaker = TextGenerator(served, Model(base="of the choice"), torch.device("cpu"))
    ids = Batch().input_ids[:, : LENGTHS[0]]
    with torch.no_grad():
        with_prompt, without = loaded(ids).logits[:, -LENGTHS[0] :], plain(ids).logits
    assert torch.allclose(speaker.logits(ids), with_prompt, atol=1e-5)
    assert len(speaker.answers(["some text", "more"], 4)) == 2
    speaker.switch(ServedModel(str(base)))
    assert torch.allclose(speaker.logits(ids), without, atol=1e-5)
