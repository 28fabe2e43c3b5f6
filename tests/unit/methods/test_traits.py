"""The table of traits against the recipe's methods and what each method really does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config.load import load_recipe
from dtrain.config.methods import TRAITS, Method, over_nf4, parse_method
from dtrain.methods.base import build_method
from dtrain.objectives.base import adapters_disabled

KINDS = [kind for group in get_args(get_args(Method)[0])
         for kind in get_args(group.model_fields["kind"].annotation)]  # fmt: skip


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def tiny_llama() -> LlamaForCausalLM:
    """A frozen model with one layer and random weights."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def test_every_kind_of_method_has_traits() -> None:
    assert sorted(KINDS) == sorted(TRAITS)


@pytest.mark.parametrize("kind", KINDS)
def test_traits_match_what_trains(kind: str) -> None:
    settings = parse_method({"kind": kind})
    base = tiny_llama()
    before = {id(parameter) for parameter in base.parameters()}
    linear = base.model.layers[0].mlp.down_proj
    model = build_method(settings).attach(base, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    traits = settings.traits
    assert all(p.dtype == torch.float32 for p in trained)
    assert traits.trains_base == any(id(p) in before for p in trained)
    assert traits.adds_adapter == any(id(p) not in before for p in trained)
    outside = settings.outer_shapes(hidden=32, layers=1, kv=16)
    assert traits.adds_adapter == (settings.adapter is not None or bool(outside))
    if outside:
        shapes = [without_ones(p.shape) for p in trained]
        assert sorted(shapes) == sorted(map(without_ones, outside))
    if settings.adapter is not None:
        expected = settings.adapter.shapes("mlp.down_proj", *linear.weight.shape)
        layers = dict(model.named_modules())
        (adapted,) = (m for n, m in layers.items() if n.endswith("layers.0.mlp.down_proj"))
        shapes = [without_ones(p.shape) for p in adapted.parameters() if p.requires_grad]
        assert sorted(shapes) == sorted(map(without_ones, expected))


# The stage of loftq starts from what its first adapter makes of the base.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "loftq"])
def test_a_disabled_adapter_leaves_the_base_where_the_traits_say_so(kind: str) -> None:
    settings = parse_method({"kind": kind})
    base, ids = tiny_llama(), torch.arange(12).view(1, -1)
    before = base(ids).logits
    method = build_method(settings)
    model = method.attach(base, seed=0)
    method.on_weights_loaded(model)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        trained = model(ids).logits
        with adapters_disabled(model):
            disabled = model(ids).logits
    assert not torch.equal(trained, before)
    assert torch.equal(disabled, before) == settings.traits.base_when_disabled


@pytest.mark.parametrize("kind", KINDS)
def test_base_dtype_of_each_method(kind: str) -> None:
    dtype = build_method(parse_method({"kind": kind})).base_dtype(torch.bfloat16)
    assert dtype == (torch.float32 if TRAITS[kind].trains_base else torch.bfloat16)


@pytest.mark.parametrize(
    "method",
    ["{kind: lora}", "{kind: lora, r: 4}", "{kind: adalora}", "{kind: adalora, target_r: 8}",
     "{kind: dora}", "{kind: full, trainable_layers: 2}", "{kind: pissa, r: 32}"],
)  # fmt: skip
def test_the_key_that_puts_a_base_in_nf4_gives_the_planned_method(method: str) -> None:
    key = f"stages.task.method={method}"
    planned, setting = over_nf4(load_recipe("tiny", [key]).stages[1].method)
    assert load_recipe("tiny", [key, f"stages.task.{setting}"]).stages[1].method == planned
