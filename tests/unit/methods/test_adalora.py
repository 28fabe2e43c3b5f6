"""AdaLoRA against PEFT's model and rank allocator, which are called in the order of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model

from dtrain.config.data import Data
from dtrain.config.load import load_recipe
from dtrain.config.methods import AdaLora
from dtrain.config.schema import Recipe
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.distributed.world import World, end_world, start_world
from dtrain.engines.ddp import Ddp
from dtrain.methods.base import build_method
from dtrain.models.load import load_base
from dtrain.models.loss import target_losses
from dtrain.models.routing import ExpertLoad
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives.base import StageContext
from dtrain.objectives.causal_lm import SupervisedFinetuning
from dtrain.objectives.regularizers.base import build_stage_objective
from dtrain.samples.make import ensure
from dtrain.training.callbacks import Callback
from dtrain.training.train_step import train_step

STEPS, RATE, RANK, FINAL, EVERY = 10, 1e-2, 6, 3, 2
METHOD = (
    f"stages.domain.method={{kind: adalora, r: {RANK}, target_r: {FINAL}, alpha: 9.0, "
    f"dropout: 0.0, allocate_every_steps: {EVERY}}}"
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield start_world("cpu")
    end_world()


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("tiny", [METHOD, "model.kernels=off"])


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    path = tmp_path / "rows.jsonl"
    rows = [f'{{"instruction": "Say {n}", "output": "It is {n * n}"}}\n' for n in range(20)]
    path.write_text("".join(rows))
    sources = [{"path": str(path), "format": "alpaca"}]
    data = Data.model_validate({"sources": sources, "sequence_length": 48})
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    dataset = prepare(data, SupervisedFinetuning.dataset, tokenizer, "t", tmp_path / "cache")
    return Loader(dataset, seed=0, global_batch=2, total_sequences=2 * STEPS)


def base_model(recipe: Recipe) -> Any:
    options = {"quantized": False, "dtype": torch.float32, "device": torch.device("cpu")}
    return load_base(ensure("tiny-llama"), recipe.model, **options)  # type: ignore[arg-type]


def peft_model(recipe: Recipe, values: dict[str, torch.Tensor]) -> PeftModel:
    """PEFT's model with the same first values and schedule."""
    config = AdaLoraConfig(
        target_modules="all-linear",
        init_r=RANK,
        target_r=FINAL,
        lora_alpha=9,
        lora_dropout=0.0,
        tinit=STEPS // 10,
        tfinal=STEPS * 3 // 10,
        deltaT=EVERY,
        total_step=STEPS,
        orth_reg_weight=0.5,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base_model(recipe), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values.pop(name))
    assert not values and isinstance(model, PeftModel)
    return model


def with_orthogonality(model: PeftModel, loss: torch.Tensor) -> torch.Tensor:
    """PEFT adds its term to the loss that a model returns."""
    tuner: Any = model.base_model
    inner, original = tuner.model, tuner.model.forward
    inner.forward = lambda: SimpleNamespace(loss=loss)
    total: torch.Tensor = tuner().loss
    inner.forward = original
    return total


def peft_losses(model: PeftModel, loader: Loader, recipe: Recipe) -> list[float]:
    tuner: Any = model.base_model
    allocator, train, losses = tuner.rankallocator, recipe.stages[0].train, []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=train.weight_decay)
    initial, last = STEPS // 10, STEPS - STEPS * 3 // 10
    for update in range(1, STEPS + 1):
        batches = loader.micro_batches(update - 1, 0, 1, 1)
        task = sum(target_losses(model, batch)[0] for batch in batches)
        loss = with_orthogonality(model, task / loader.counts(update - 1).supervised_tokens)
        loss.backward()
        losses.append(float(loss.detach()))
        if update <= last:
            allocator.update_ipt(tuner.model)
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        optimizer.step()
        if update == last or (initial < update < last and update % EVERY == 0):
            budget, _ = allocator.budget_schedule(update)
            pattern = allocator.mask_to_budget(tuner.model, budget)
        elif update > last:
            allocator.mask_using_rank_pattern(tuner.model, pattern)
        optimizer.zero_grad()
    return losses


def test_losses_and_ranks_are_those_of_peft(recipe, loader, world, tmp_path) -> None:
    stage = recipe.stages[0]
    assert isinstance(stage.method, AdaLora)
    model = build_method(stage.method).attach(base_model(recipe), seed=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    oracle = peft_model(recipe, {name: p.detach().clone() for name, p in trained.items()})
    engine = Ddp(model, recipe, stage, world, lambda block: None)
    objective = build_stage_objective(stage)
    context = StageContext(tmp_path, tmp_path, tmp_path, {}, True, loader, world, Any)  # type: ignore
    objective.begin_stage(context)
    objective.begin_training(engine)
    trainer: Any = SimpleNamespace(
        engine=engine,
        objective=objective,
        loader=loader,
        seed=0,
        callbacks=Callback(),
        expert_load=ExpertLoad(model),
    )
    results = [train_step(trainer, step, RATE, wants_stop=False) for step in range(STEPS)]

    expected = peft_losses(oracle, loader, recipe)
    assert [r.loss for r in results] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.9 * expected[0]
    theirs = dict(oracle.named_parameters())
    values = {name: p for name, p in trained.items() if ".lora_E." in name}
    kept = sum(int((value != 0).sum()) for value in values.values())
    assert kept == FINAL * len(values)
    assert len({int((value != 0).sum()) for value in values.values()}) > 1, "all ranks are equal"
    for name, value in trained.items():
        assert torch.equal(value == 0, theirs[name] == 0), name
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)
    assert 0 < results[-1].metrics["orthogonality"] < results[-1].loss


@pytest.mark.parametrize(
    ("changes", "budgets"),
    [
        ({}, {1: None, 2: 47, 3: None, 4: 33, 6: 30, 7: 30, 8: None, 10: None}),
        ({"allocate_every_steps": 100}, {2: None, 6: None, 7: 30, 8: None}),
        ({"initial_ratio": 0.0, "final_ratio": 0.0, "allocate_every_steps": 5}, {5: 33, 10: 30}),
    ],
)
def test_budget_falls_from_the_first_to_the_final_rank(recipe, changes, budgets) -> None:
    method = recipe.stages[0].method.model_copy(update=changes)
    assert {update: method.budget(update, STEPS, layers=10) for update in budgets} == budgets
