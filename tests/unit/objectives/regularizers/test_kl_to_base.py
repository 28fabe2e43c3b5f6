"""The divergence from the base, against whole logits of both models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

from dtrain.config.data import Data
from dtrain.config.load import load_recipe
from dtrain.config.methods import Lora
from dtrain.config.preference import PreferenceSettings
from dtrain.config.regularize import KlToBase
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.methods.base import build_method
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import load_base
from dtrain.models.loss import target_logits
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives.base import adapters_disabled, build_objective, objective_class
from dtrain.objectives.regularizers.base import TERM, build_stage_objective
from dtrain.samples.make import ensure
from tests.micro_batches import fill_lora_b

LORA = Lora(kind="lora", r=4)

CPU = torch.device("cpu")
WEIGHT = 0.7


@pytest.fixture(params=["auto", "off"])
def model(request) -> nn.Module:
    """A tiny model whose adapters change its output, with chunked and with whole logits."""
    settings = load_recipe("tiny").model.model_copy(update={"kernels": request.param})
    base = load_base(
        ensure("tiny-llama"), settings, quantized=False, dtype=torch.float32, device=CPU
    )
    adapted = build_method(Lora(kind="lora", r=3, dropout=0.0)).attach(base, seed=0)
    with torch.no_grad():
        fill_lora_b(adapted, std=0.1)
    apply_kernels(adapted, settings)
    return adapted


def rows(kind: str, start: int) -> list[dict[str, str]]:
    if kind == "sft":
        return [{"instruction": f"Say {n}", "output": "It is " * (n % 3 + 1)} for n in range(start)]
    return [
        {"prompt": f"Say {n}", "chosen": f"It is {n}", "rejected": "no " * (n % 3 + 1)}
        for n in range(start)
    ]


def loader_of(kind: str, folder: Path, batch: int) -> Loader:
    paths = []
    for name, count in (("rows", 12), ("replay", 7)):
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows(kind, count)))
    own, replay = ({"path": str(path)} for path in paths)
    data = Data.model_validate(
        {"sources": [own], "replay": replay | {"ratio": 0.4}, "sequence_length": 96}
    )
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    dataset = prepare(data, objective_class(kind).dataset, tokenizer, "t", folder / "cache")
    return Loader(dataset, seed=0, global_batch=batch, total_sequences=batch)


def dense_kl(model: nn.Module, loader: Loader, on: str) -> torch.Tensor:
    """The mean of KL(base || model) at the chosen targets of the only step."""
    losses = []
    for number in loader.batch(0):
        if on == "replay" and number < loader.dataset.first_sequences[-2]:
            continue
        batch = loader.read(np.array([number]))
        with torch.no_grad(), adapters_disabled(model):
            log_p = log_softmax(target_logits(model, batch).double(), 1)
        log_q = log_softmax(target_logits(model, batch).double(), 1)
        losses.append((log_p.exp() * (log_p - log_q)).sum(1))
    return torch.cat(losses).mean()


def total(objective: Any, model: nn.Module, loader: Loader, micro_batch: int) -> Any:
    """Loss and term of a step, normalized, with the gradients in the model."""
    weight, outputs = objective.weight(loader.counts(0)), []
    for batch in loader.micro_batches(0, 0, 1, micro_batch):
        outputs.append(objective.loss(model, batch, None))
        (outputs[-1].loss / weight).backward()
    sums = (
        [sum(float(output.metric_sums[TERM]) for output in outputs)]
        if TERM in outputs[0].metric_sums
        else [0.0]
    )
    return sum(float(output.loss) for output in outputs) / weight, sums[0] / weight


@pytest.mark.parametrize(
    ("kind", "on", "micro"), [("sft", "replay", 1), ("sft", "all", 3), ("dpo", "replay", 2)]
)
def test_term_and_gradients_equal_whole_logits(model, tmp_path, kind, on, micro) -> None:
    loader = loader_of(kind, tmp_path, 6)
    sources = loader.dataset.sources_of(loader.batch(0))
    assert 0 < (sources == 1).sum() < 6
    term = KlToBase(kind="kl_to_base", weight=WEIGHT, on=on)
    stage: Any = SimpleNamespace(
        kind=kind, regularize=term, preference=PreferenceSettings(), train=None, method=LORA
    )
    objective = build_stage_objective(stage)
    objective.begin_stage(SimpleNamespace(loader=loader, base_when_disabled=True))  # type: ignore[arg-type]
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss, found = total(objective, model, loader, micro)
    gradients = [p.grad.clone() for p in parameters]

    model.zero_grad()
    task, _ = total(build_objective(stage), model, loader, 1)
    dense = WEIGHT * dense_kl(model, loader, on)
    dense.backward()
    assert float(dense) > 0.01 * task
    assert found == pytest.approx(float(dense), rel=1e-5)
    assert loss == pytest.approx(task + float(dense), rel=1e-5)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_step_without_replayed_rows_has_no_term(model, tmp_path) -> None:
    loader = loader_of("sft", tmp_path, 1)
    while (loader.dataset.sources_of(loader.batch(0)) == 1).any():
        loader = Loader(loader.dataset, seed=loader.seed + 1, global_batch=1, total_sequences=1)
    term = KlToBase(kind="kl_to_base", weight=WEIGHT)
    stage: Any = SimpleNamespace(kind="sft", regularize=term, preference=None, method=LORA)
    objective = build_stage_objective(stage)
    objective.begin_stage(SimpleNamespace(loader=loader, base_when_disabled=True))  # type: ignore[arg-type]
    loss, found = total(objective, model, loader, 1)
    assert found == 0.0
    assert loss == total(build_objective(stage), model, loader, 1)[0]
