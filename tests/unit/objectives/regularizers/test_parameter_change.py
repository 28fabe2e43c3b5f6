"""Penalties on the change of the base's parameters, against dense tensors and plain autograd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config.data import Data
from dtrain.config.load import load_recipe
from dtrain.config.methods import Full
from dtrain.config.regularize import Ewc, L2Init
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.distributed.world import World, end_world, start_world
from dtrain.engines.ddp import Ddp
from dtrain.methods.base import build_method
from dtrain.models.load import load_base
from dtrain.models.loss import target_losses
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives.base import StageContext
from dtrain.objectives.causal_lm import SupervisedFinetuning
from dtrain.objectives.regularizers.base import TERM, build_stage_objective
from dtrain.objectives.regularizers.fisher import chosen_sequences
from dtrain.samples.make import ensure

WEIGHT = 0.3


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield start_world("cpu")
    end_world()


@pytest.fixture
def engine(world) -> Ddp:
    """The sample model in an engine; every parameter trains."""
    recipe = load_recipe("tiny", ["stages.domain.method={kind: full}", "model.kernels=off"])
    base = load_base(
        ensure("tiny-llama"),
        recipe.model,
        quantized=False,
        dtype=torch.float32,
        device=world.device,
    )
    model = build_method(Full(kind="full")).attach(base, seed=0)
    return Ddp(model, recipe, recipe.stages[0], world, lambda block: None)


@pytest.fixture
def context(tmp_path: Path, world) -> StageContext:
    rows = [f'{{"instruction": "Say {n}", "output": "It is {n * n}"}}\n' for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(rows[:6]))
    (tmp_path / "replay.jsonl").write_text("".join(rows[6:]))
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "alpaca"}
    replay = {"path": str(tmp_path / "replay.jsonl"), "format": "alpaca", "ratio": 0.5}
    data = Data.model_validate({"sources": [source], "replay": replay, "sequence_length": 48})
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    dataset = prepare(data, SupervisedFinetuning.dataset, tokenizer, "t", tmp_path / "cache")
    loader = Loader(dataset, seed=0, global_batch=2, total_sequences=4)
    folder = tmp_path / "stage"
    return StageContext(tmp_path, tmp_path, folder, {}, False, loader, world, Any)  # type: ignore


def gradients(model: nn.Module) -> list[torch.Tensor]:
    result = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return result


def dense_fisher(model: nn.Module, context: StageContext, settings: Ewc) -> list[torch.Tensor]:
    loader, ids = chosen_sequences(context, settings)
    assert len(ids) > 1
    sums, targets = [torch.zeros_like(p) for p in model.parameters()], 0
    for number in range(len(ids)):
        batch = loader.read(ids[number : number + 1])
        target_losses(model, batch)[0].backward()
        sums = [s + g**2 for s, g in zip(sums, gradients(model), strict=True)]
        targets += len(batch.targets)
    return [total / targets for total in sums]


@pytest.mark.parametrize("kind", ["l2_init", "ewc"])
def test_loss_and_gradient_have_the_term(kind, engine, context) -> None:
    term = {"l2_init": L2Init, "ewc": Ewc}[kind](kind=kind, weight=WEIGHT)
    stage = SimpleNamespace(kind="sft", regularize=term, preference=None, method=Full(kind="full"))
    objective = build_stage_objective(stage)  # type: ignore[arg-type]
    objective.begin_stage(context)
    objective.begin_training(engine)
    model = engine.module
    assert engine.update_count == 0 and not gradients(model), "the estimate left something behind"
    factors = [torch.ones_like(p) for p in model.parameters()]
    if isinstance(term, Ewc):
        factors = dense_fisher(model, context, term)
        again = build_stage_objective(stage)  # type: ignore[arg-type]
        again.begin_stage(context)
        with torch.no_grad():  # what is saved is read: nothing is estimated again
            parameter = next(model.parameters())
            first = parameter[0, 0].clone()
            parameter[0, 0] = float("nan")
            again.begin_training(engine)
            parameter[0, 0] = first
        for left, right in zip(again.factors, objective.factors, strict=True):  # type: ignore
            assert torch.equal(left, right)

    start = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    batches = list(context.loader.micro_batches(0, 0, 1, 1))
    objective.begin_step(model, batches, context.world)
    outputs = []
    for number, batch in enumerate(batches):
        engine.before_forward(last=number == len(batches) - 1)
        outputs.append(objective.loss(engine.model, batch, None))
        weight = objective.weight(context.loader.counts(0))
        engine.backward(outputs[-1].loss / weight, last=number == len(batches) - 1)
    objective.before_update(engine)
    found = gradients(model)

    task = sum(target_losses(model, batch)[0] for batch in batches) / weight
    changes = zip(model.parameters(), start, factors, strict=True)
    dense = WEIGHT / 2 * sum(((p - p0) ** 2 * f).sum() for p, p0, f in changes)
    (task + dense).backward()
    for gradient, exact in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-7)
    assert float(sum(o.loss.detach() for o in outputs)) / weight == pytest.approx(
        float((task + dense).detach()), 1e-5
    )
    terms = [float(output.metric_sums[TERM]) for output in outputs]
    assert sum(terms) / weight == pytest.approx(float(dense.detach()), rel=1e-5)
    assert float(dense.detach()) > 1e-4 * float(task.detach())
