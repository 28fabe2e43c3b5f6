"""Bottleneck adapters: the formula, the start, and what serves them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dtrain.config.methods import Bottleneck
from dtrain.config.schema import Model
from dtrain.core.errors import UserError
from dtrain.merge.from_checkpoint import checkpoint_adapter
from dtrain.methods.base import build_method
from dtrain.models.hub import base_folder
from dtrain.objectives.base import adapters_disabled
from dtrain.samples.make import ensure
from dtrain.serving.generator import TextGenerator
from dtrain.serving.run_models import ServedModel

SETTINGS = Bottleneck(kind="bottleneck", bottleneck_size=5, activation="gelu")
IDS = torch.arange(24)[None]


@pytest.fixture
def base() -> Path:
    ensure("tiny-llama")
    return base_folder("dtrain:tiny-llama")


def load(base: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)


def trained(base: Path) -> nn.Module:
    """A model whose adapters change its logits."""
    model = build_method(SETTINGS).attach(load(base), seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def test_starts_as_the_base_and_returns_to_it(base: Path) -> None:
    expected = logits(load(base))
    assert torch.equal(logits(build_method(SETTINGS).attach(load(base), seed=0)), expected)
    model = trained(base)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    with adapters_disabled(model):
        assert torch.equal(logits(model), expected)


def test_computes_the_formula_after_attention_and_mlp(base: Path) -> None:
    model, plain = trained(base), load(base)
    adapted = [n for n, m in model.named_modules() if hasattr(m, "adapter_down")]
    count = model.config.num_hidden_layers
    assert len(adapted) == 2 * count and adapted[1] == "model.layers.0.mlp.down_proj"
    for name in adapted:
        down, up = (model.get_submodule(f"{name}.adapter_{part}") for part in ("down", "up"))

        def add(_: nn.Module, __: Tensor, y: Tensor, down: nn.Linear = down, up: nn.Linear = up):
            inner = nn.functional.gelu(y @ down.weight.T + down.bias)
            return y + inner @ up.weight.T + up.bias

        plain.get_submodule(name).register_forward_hook(add)
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


def test_is_served_unmerged_next_to_its_base(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    build_method(SETTINGS).save(tmp_path / "adapter", model, tensors, base=str(base))
    served = ServedModel(str(base), adapters=(tmp_path / "adapter",))
    speaker = TextGenerator(served, Model(base="of the choice"), torch.device("cpu"))
    assert torch.allclose(speaker.logits(IDS), logits(model), atol=1e-5)
    speaker.switch(ServedModel(str(base)))
    assert torch.allclose(speaker.logits(IDS), logits(load(base)), atol=1e-5)
    speaker.switch(served)
    assert torch.allclose(speaker.logits(IDS), logits(model), atol=1e-5)


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    build_method(SETTINGS).save(tmp_path / "adapter", model, tensors)
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=model.config.vocab_size, hidden_size=16, intermediate_size=24,
        num_hidden_layers=model.config.num_hidden_layers, num_attention_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "base")
    for file in base.glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    choice = ServedModel(str(tmp_path / "base"), adapters=(tmp_path / "adapter",))
    with pytest.raises(UserError, match="does not fit this base"):
        TextGenerator(choice, Model(base="of the choice"), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["bottleneck", "prefix"])
def test_a_checkpoint_of_what_cannot_merge_is_refused(kind: str) -> None:
    origin = SimpleNamespace(method={"kind": kind})
    saved: Any = SimpleNamespace(origin=origin, checkpoint=SimpleNamespace(folder="step-1"))
    with pytest.raises(UserError, match=f"{kind} cannot be merged"):
        checkpoint_adapter(saved, base=None)  # type: ignore[arg-type]
