"""Routers that train: the load-balancing loss of a global batch, against transformers'."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dtrain.config.methods import Full, Lora
from dtrain.core.errors import UserError
from dtrain.data.loader import NO_SEQUENCE, MicroBatch
from dtrain.methods.base import build_method
from dtrain.models.expert_layers import count_choices
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.routing import ExpertLoad, LoadBalance
from dtrain.objectives.base import Objective
from dtrain.objectives.causal_lm import ContinuedPretraining
from dtrain.objectives.regularizers.router_balance import RouterBalance
from tests.micro_batches import micro_batch

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip
COEFFICIENT = 0.5
LENGTHS = [7, 12, 3, 9]
TOKENS = sum(LENGTHS)


def mixture(kind: str = "qwen3_moe", **keys: Any) -> PreTrainedModel:
    keys = {"num_experts": 4, "moe_intermediate_size": 16, "num_local_experts": 4} | keys
    keys |= {"router_aux_loss_coef": COEFFICIENT}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **keys)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # uneven choices
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.copy_(torch.randn(parameter.shape))
    return model


def trained(model: PreTrainedModel, **keys: Any) -> Any:
    return build_method(Lora(kind="lora", r=2, dropout=0.0, **keys)).attach(model, seed=0)


def batch(first: int, count: int, sequence_id: int = 0) -> MicroBatch:
    """Sequences of a document each, from number `first` on."""
    lengths = LENGTHS[first : first + count]
    start = sum(LENGTHS[:first])
    ids = torch.arange(start, start + sum(lengths)) % 97
    return micro_batch(
        ids,
        lengths,
        range(first, first + count),
        lengths,
        sequence_ids=[sequence_id] * count,
        document_ids=np.arange(count),
        labels=np.zeros(count, dtype=np.int64),
    )


class Alone:
    """A world of one rank."""

    size, rank, device = 1, 0, CPU

    def sum(self, values: list[float]) -> list[float]:
        return values


def objective_on(model: Any) -> RouterBalance:
    counts = SimpleNamespace(supervised_tokens=TOKENS - len(LENGTHS))
    loader = SimpleNamespace(
        seed=0, global_batch=len(LENGTHS), counts=lambda step: counts, loss_weights=np.empty(0)
    )
    inner: Objective = ContinuedPretraining(SimpleNamespace())  # type: ignore[arg-type]
    objective = RouterBalance(SimpleNamespace(), inner)  # type: ignore[arg-type]
    objective.begin_stage(SimpleNamespace(loader=loader, world=Alone()))  # type: ignore[arg-type]
    objective.begin_training(SimpleNamespace(module=model))
    return objective


def global_batch(model: Any, batches: list[MicroBatch]) -> tuple[float, float, dict[str, Tensor]]:
    """The loss and the load-balancing loss of a step, and gradients by name."""
    objective, weight = objective_on(model), TOKENS - len(LENGTHS)
    statistics = objective.begin_step(model, batches, Alone())  # type: ignore[arg-type]
    loss = term = 0.0
    for each in batches:
        output = objective.loss(model, each, statistics)
        (output.loss / weight).backward()
        loss += float(output.loss) / weight
        term += float(output.metric_sums["router_aux_loss"]) / weight
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss, term, gradients


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_the_loss_of_one_batch_is_that_of_transformers(kind: str) -> None:
    keys = {"layer_types": ["full_attention"] * 2} if kind == "gpt_oss" else {}
    model = mixture(kind, **keys).train()
    whole = batch(0, 1)
    _, term, gradients = global_batch(build_method(Full(kind="full", router="train")).attach(
        model, seed=0), [whole])  # fmt: skip
    gradients = {name: g.clone() for name, g in gradients.items()}
    model.zero_grad()
    output = model(input_ids=whole.input_ids, labels=whole.input_ids, output_router_logits=True)
    weight = TOKENS - len(LENGTHS)
    targets = LENGTHS[0] - 1  # transformers' loss is a mean over them, and the step's over `weight`
    plain = output.loss - COEFFICIENT * output.aux_loss
    (plain * targets / weight + COEFFICIENT * output.aux_loss).backward()
    assert term == pytest.approx(COEFFICIENT * float(output.aux_loss), rel=1e-5)
    routers = [n for n in gradients if n.endswith(("gate.weight", "router.weight"))]
    assert len(routers) == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recomputes", [False, True])
def test_micro_batches_change_neither_loss_nor_gradient(recomputes: bool) -> None:
    def model() -> Any:
        base = mixture()
        if recomputes:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        adapted = trained(base, router="train")
        patch_modules(adapted)
        return adapted

    loss, term, expected = global_batch(model(), [batch(0, 4)])
    empty = batch(3, 1, NO_SEQUENCE)
    empty = MicroBatch(
        empty.input_ids[:, :2], empty.position_ids[:, :2], empty.targets[:0], empty.targets[:0],  # type: ignore[index]
        [2], [3], [2], [NO_SEQUENCE],
    )  # fmt: skip
    parts = [batch(0, 1), batch(1, 2), batch(3, 1), empty]  # the last counts nowhere
    split, split_term, gradients = global_batch(model(), parts)
    assert split == pytest.approx(loss, abs=1e-6) and split_term == pytest.approx(term, abs=1e-6)
    assert term > COEFFICIENT * 2 * 1.01  # above that of even choices
    assert sum("gate.modules_to_save" in name for name in gradients) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_load_is_of_the_tokens_that_train() -> None:
    model = trained(mixture())
    load = ExpertLoad(model)
    tokens = batch(0, 4)

    def forward() -> None:
        model(input_ids=tokens.input_ids, position_ids=tokens.position_ids, use_cache=False)

    forward()  # outside of a step
    with load.recording():
        forward()
        with torch.no_grad():
            forward()  # a reference
    with load.recording(is_empty=True):
        forward()
    counts = load.take()
    assert len(counts) == 8 and sum(counts) == 2 * 2 * TOKENS
    assert load.take() == [0.0] * 8
    on_device = count_choices(torch.empty(5, 2, dtype=torch.int64, device="meta"), 4)
    assert on_device.is_meta, "counting waited for the device"
    assert load.metrics([0, 6, 1, 1, 2, 2, 2, 2]) == {
        "layers.0": {"max_load": 3.0, "unused": 1},
        "layers.1": {"max_load": 1.0, "unused": 0},
    }


def test_the_load_leaves_out_what_no_expert_computes() -> None:
    model = mixture()
    load = ExpertLoad(model)
    with load.recording():  # no text goes to the second layer's experts
        model.model.layers[0].mlp.experts(  # type: ignore[operator,union-attr,index]
            torch.randn(3, 32),
            torch.tensor([[0, 3], [3, 1], [0, 2]]),
            torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]),  # of a token that passes: zeros
        )
    counts = load.take()
    assert counts == [1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert load.metrics(counts) == {"layers.0": {"max_load": 2.6667, "unused": 2}}


def test_routers_are_frozen_unless_the_recipe_trains_them() -> None:
    for method in (Full(kind="full"), Lora(kind="lora", r=2)):
        model = build_method(method).attach(mixture(), seed=0)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert names and not any("mlp.gate." in name for name in names)
    with pytest.raises(UserError, match="is a router") as error:
        trained(mixture(), target_modules=["q_proj", "gate"])
    assert "method.router=train" in error.value.fix
    with pytest.raises(UserError, match="is a router") as error:
        trained(mixture(), modules_to_save=["mlp.gate"])
    assert "method.router=train" in error.value.fix
    config = AutoConfig.for_model("llama", **SMALL)
    dense = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="no routers"):
        trained(dense, router="train")


def test_a_model_without_the_loss_says_so() -> None:
    deepseek = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    model = mixture("glm4_moe", **deepseek)
    adapted = trained(model, router="train")
    assert LoadBalance(adapted).obstacle
    assert LoadBalance(mixture()).obstacle == ""
    objective = objective_on(adapted)
    statistics = objective.begin_step(adapted, [batch(0, 4)], Alone())  # type: ignore[arg-type]
    objective.loss(adapted, batch(0, 4), statistics).loss.backward()
    trains = {n: p for n, p in adapted.named_parameters() if p.requires_grad and "gate." in n}
    assert any("mlp.gate" in n for n in trains) and all(p.grad is not None for p in trains.values())
