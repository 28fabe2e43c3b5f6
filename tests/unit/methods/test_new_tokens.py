"""Rows of new tokens that train with an adapter; PEFT's trainable tokens as oracle."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedModel

from dtrain.config.methods import parse_method
from dtrain.core.errors import UserError
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import adapter_input
from dtrain.methods.base import build_method
from dtrain.methods.new_tokens import check_new_tokens
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.loss import target_losses
from dtrain.objectives.base import adapters_disabled

NEW = [61, 62]
IDS = torch.tensor([[*range(20), 61, 7, 62, 61, *range(12), 62]])
STEPS = 4
LORA = {"kind": "lora", "r": 4, "alpha": 8.0, "dropout": 0.0}
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)


def attach(base: Path, **settings: Any) -> tuple[Any, nn.Module]:
    method = build_method(parse_method(settings), NEW)
    model = method.attach(load(base), seed=0)
    check_new_tokens(model)
    return method, model


def losses(model: nn.Module, *, fused: bool) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    packed = SimpleNamespace(
        input_ids=IDS, position_ids=torch.arange(IDS.shape[1])[None],
        target_positions=torch.arange(IDS.shape[1] - 1), targets=IDS[0, 1:],
        document_lengths=[IDS.shape[1]],
    )  # fmt: skip
    values = []
    for _ in range(STEPS):
        if fused:
            loss = target_losses(model, packed)[0] / len(packed.targets)
        else:
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "kernels"])
def test_losses_are_those_of_peft(base: Path, fused: bool) -> None:
    _, model = attach(base, **LORA)
    is_tied = load(base).config.tie_word_embeddings
    rows: Any = NEW if is_tied else {"embed_tokens": NEW, "lm_head": NEW}
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM",
        trainable_token_indices=rows,
    )  # fmt: skip
    oracle = get_peft_model(load(base), config)
    first = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        parameter.data.copy_(first[name])
    if fused:
        assert patch_modules(model)["chunked loss"]
    ours, theirs = losses(model, fused=fused), losses(oracle, fused=False)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0] - 0.05, "nothing was learned: the comparison would prove nothing"
    for (name, a), (_, b) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_peft_loads_and_a_merge_computes_what_was_trained(
    kind: str, base: Path, tmp_path: Path
) -> None:
    before = load(base)
    method, model = attach(base, **LORA | {"kind": kind})
    method.on_weights_loaded(model)
    assert torch.equal(logits(model), logits(before))
    model.train()
    losses(model, fused=False)
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    method.save(tmp_path / "adapter", model, tensors)
    trained = logits(model)
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(before))
    assert torch.allclose(
        logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter")), trained, atol=1e-5
    )
    job = MergeJob(base, tmp_path / "merged", source="a base")
    job.merge_adapters([adapter_input(MergeableAdapter.open(tmp_path / "adapter", job.tensors))])
    merged = load(tmp_path / "merged")
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    assert merged.config.tie_word_embeddings == before.config.tie_word_embeddings
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(m, get)().weight for m in (before, merged))
        assert (old != new).any(1).nonzero().flatten().tolist() == NEW, "other rows have changed"


REFUSED = {
    "ia3": ({"kind": "ia3"}, "leaves the embeddings as they are"),
    "an embedding alone": ({"kind": "ia3", "modules_to_save": ["embed_tokens"]}, "output matrix"),
    "frozen": ({"kind": "full", "frozen_modules": ["embed_tokens"]}, "the embeddings as they are"),
    "an adapter on the head": (
        LORA | {"target_modules": ["q_proj", "lm_head"]}, "lm_head cannot have an adapter and rows"
    ),
}  # fmt: skip


@pytest.mark.parametrize("base", [False], indirect=True, ids=["untied"])
@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_method_that_leaves_new_tokens_as_they_are_is_refused(
    settings: dict[str, Any], message: str, base: Path
) -> None:
    with pytest.raises(UserError, match=message):
        attach(base, **settings)


@pytest.mark.parametrize("base", [False], indirect=True, ids=["untied"])
def test_whole_modules_train_in_place_of_rows(base: Path) -> None:
    _, model = attach(base, **LORA, modules_to_save=["lm_head"])
    trains = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert ["token_adapter" in name for name in trains] == [True, False]


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(PhiConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head has a bias, which PEFT leaves out"):
        attach(tmp_path, **LORA)
