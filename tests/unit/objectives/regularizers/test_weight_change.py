"""Penalties on the change of the weights, against dense tensors and plain autograd."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.config.data import Data
from dtrain.config.load import load_recipe
from dtrain.config.methods import Lora
from dtrain.config.regularize import Ewc, L2Init
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.methods.base import build_method
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import load_base
from dtrain.models.loss import target_losses
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives.base import StageContext
from dtrain.objectives.causal_lm import SupervisedFinetuning
from dtrain.objectives.regularizers.base import TERM, build_stage_objective
from dtrain.objectives.regularizers.fisher import fisher_factors, penalized_layers
from dtrain.objectives.regularizers.weight_change import penalty, penalty_gradient
from dtrain.samples.make import ensure

CPU = torch.device("cpu")
SEQUENCES = 3


@pytest.fixture
def world() -> Any:
    return SimpleNamespace(
        rank=0, size=1, is_first=True, device=CPU, sum=list, sum_tensors=lambda tensors: None
    )


@pytest.fixture(params=["auto", "off"])
def model(request) -> nn.Module:
    """A tiny model whose adapters change its weights, with and without kernels."""
    settings = load_recipe("tiny").model.model_copy(update={"kernels": request.param})
    base = load_base(
        ensure("tiny-llama"), settings, quantized=False, dtype=torch.float32, device=CPU
    )
    adapted = build_method(Lora(kind="lora", r=3, alpha=5.0, dropout=0.0)).attach(base, seed=0)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05 + 0.001 * index)
    apply_kernels(adapted, settings)
    return adapted


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    folder: Path = tmp_path_factory.mktemp("rows")
    rows = [f'{{"instruction": "Say {n}", "output": "It is {n * n}"}}\n' for n in range(40)]
    for name, part in (("rows", rows[:20]), ("replay", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    data = Data.model_validate(
        {
            "sources": [{"path": str(folder / "rows.jsonl"), "format": "alpaca"}],
            "replay": {"path": str(folder / "replay.jsonl"), "format": "alpaca", "ratio": 0.5},
            "sequence_length": 96,
        }
    )
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    spec = SupervisedFinetuning.dataset
    dataset = prepare(data, spec, tokenizer, "t", folder / "cache")
    return Loader(dataset, seed=0, global_batch=2, total_sequences=4)


def change(layer: Any) -> torch.Tensor:
    """s·B·A of a layer, dense."""
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return layer.scaling["default"] * product


def test_penalty_and_gradient_equal_the_dense_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=generator), torch.randn(50, 4, generator=generator)
    u, v = torch.rand(50, generator=generator), torch.rand(30, generator=generator)
    for factors in (None, (u, v)):
        a64, b64 = (t.double().requires_grad_() for t in (a, b))
        weights = 1.0 if factors is None else torch.outer(u, v).double()
        dense = 0.5 * (weights * (1.7 * b64 @ a64) ** 2).sum()
        dense.backward()
        assert float(penalty(a, b, 1.7, factors)) == pytest.approx(float(dense), rel=1e-6)
        for found, exact in zip(
            penalty_gradient(a, b, 1.7, factors), (a64.grad, b64.grad), strict=True
        ):
            assert exact is not None
            error = (found.double() - exact).norm() / exact.norm()
            assert error < 1e-6


def dense_fisher(model: nn.Module, loader: Loader) -> dict[str, torch.Tensor]:
    """Means of dy² and x² of every layer of the base, over the first replayed sequences."""
    first = int(loader.dataset.first_sequences[-2])
    base = load_base(
        ensure("tiny-llama"),
        load_recipe("tiny").model.model_copy(update={"kernels": "off"}),
        quantized=False,
        dtype=torch.float32,
        device=CPU,
    )
    base.get_input_embeddings().weight.requires_grad_()
    seen: dict[str, list[Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            seen.setdefault(name, []).append((args[0].detach(), output))

        return hook

    names = [name.removeprefix("base_model.model.") for name in penalized_layers(model)]
    for name in names:
        base.get_submodule(name).register_forward_hook(keep(name))
    targets = 0
    for number in range(loader.dataset.sequences_per_epoch):
        if number >= int(loader.dataset.first_sequences[-1]) - first:
            break
        batch = loader.read(np.array([first + number]))
        target_losses(base, batch)[0].backward()
        targets += len(batch.targets)
    found = {}
    for name, calls in seen.items():
        x = torch.cat([x[0] for x, _ in calls]).double()
        dy = torch.cat([y.grad[0] for _, y in calls]).double()
        found[f"base_model.model.{name}.u"] = dy.square().sum(0) / targets
        found[f"base_model.model.{name}.v"] = x.square().mean(0)
    return found


def context_of(loader: Loader, world: Any, cache: Path) -> StageContext:
    return StageContext(Path(), cache, cache, {}, True, loader, world, lambda _: nn.Identity())


def test_fisher_factors_are_those_of_the_base(model, loader, world, tmp_path) -> None:
    context = context_of(loader, world, tmp_path)
    settings = Ewc(kind="ewc", weight=1.0, sequences=1000)
    found = fisher_factors(model, context, settings)
    exact = dense_fisher(model, loader)
    assert found.keys() == exact.keys() and len(found) > 10
    for name, value in exact.items():
        assert value.max() > 0
        torch.testing.assert_close(found[name].double(), value, rtol=2e-4, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())
    (file,) = tmp_path.iterdir()
    with torch.no_grad():  # what is stored is read: nothing is computed again
        model.get_input_embeddings().weight.zero_()
    again = fisher_factors(model, context, settings)
    assert all(torch.equal(again[name], value) for name, value in found.items())
    # The first rank has read the file; another has none, and sums its zeros in the same order.
    sizes = list[list[int]]()
    world.sum_tensors = lambda tensors: sizes.append([len(tensor) for tensor in tensors])
    fisher_factors(model, context, settings)
    world.is_first, world.sum = False, lambda values: [1.0]
    fisher_factors(model, context, settings)
    first, other = sizes
    assert first == other
    world.is_first, world.sum = True, list
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    damaged = fisher_factors(model, context, settings)
    assert not any(torch.equal(damaged[name], value) for name, value in found.items())


@pytest.mark.parametrize("kind", ["l2_init", "ewc"])
def test_loss_and_gradients_have_the_term(kind, model, loader, world, tmp_path) -> None:
    term = {"l2_init": L2Init, "ewc": Ewc}[kind](kind=kind, weight=0.3)
    method = Lora(kind="lora")
    stage = SimpleNamespace(kind="sft", regularize=term, preference=None, method=method)
    objective = build_stage_objective(stage)  # type: ignore[arg-type]
    context = context_of(loader, world, tmp_path)
    objective.begin_stage(context)
    objective.begin_training(SimpleNamespace(module=model, autocast=nullcontext))  # type: ignore[arg-type]
    scale = 0.25
    outputs, parameters = [], [p for p in model.parameters() if p.requires_grad]
    for batch in loader.micro_batches(0, 0, 1, 1):
        outputs.append(objective.loss(model, batch, None))
        (outputs[-1].loss * scale).backward()
    found = [p.grad.clone() for p in parameters]
    model.zero_grad()

    weight = sum(output.weight for output in outputs)
    dense = torch.zeros(())
    factors = fisher_factors(model, context, term) if kind == "ewc" else {}
    for name, layer in penalized_layers(model).items():
        squares = change(layer) ** 2
        if factors:
            squares = squares * torch.outer(factors[f"{name}.u"], factors[f"{name}.v"])
        dense = dense + squares.sum()
    dense = 0.3 / 2 * weight * dense
    task = sum(target_losses(model, b)[0] for b in loader.micro_batches(0, 0, 1, 1))
    ((task + dense) * scale).backward()
    for gradient, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
    assert float(sum(o.loss for o in outputs)) == pytest.approx(float(task + dense), rel=1e-5)
    assert float(sum(o.metric_sums[TERM] for o in outputs)) == pytest.approx(float(dense), rel=1e-4)
    assert float(dense) > 1e-4 * float(task)
