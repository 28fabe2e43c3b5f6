"""Cross-entropy with label smoothing and factors, against transformers and torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.trainer_pt_utils import LabelSmoother

from dtrain.config.data import Data, Source
from dtrain.config.methods import Lora
from dtrain.config.schema import EvaluationSet, Stage
from dtrain.config.train import Train
from dtrain.models.kernels import fused_cross_entropy, native
from dtrain.models.loss import token_losses
from dtrain.objectives.base import build_objective

TARGETS, VOCABULARY, WIDTH = 11, 40, 8
SMOOTHING = 0.2


def softcap(logits: Tensor) -> Tensor:
    return 2.0 * torch.tanh(logits / 2.0)


@pytest.fixture(params=["loops", "torch"])
def who_computes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda vocabulary: 4)
    native.set_enabled(on=request.param == "loops")
    yield
    native.set_enabled(on=False)


@pytest.mark.parametrize("transform", [None, softcap])
@pytest.mark.usefixtures("who_computes")
def test_smoothing_equals_transformers(transform: Any) -> None:
    torch.manual_seed(0)
    leaves = torch.randn(TARGETS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    targets = torch.randint(0, VOCABULARY, (TARGETS,))
    for leaf in leaves:
        leaf.requires_grad_()
    hidden, weight, bias = leaves

    total, losses = fused_cross_entropy.fused_cross_entropy(
        hidden, weight, bias, targets, transform, SMOOTHING
    )
    gradients = torch.autograd.grad(total, leaves)

    logits = hidden @ weight.t() + bias
    logits = transform(logits) if transform else logits
    expected = LabelSmoother(SMOOTHING)({"logits": logits}, targets, num_items_in_batch=1)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(losses, token_losses(logits, targets, SMOOTHING).detach())
    for gradient, other in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("who_computes")
def test_factors_scale_losses_and_gradients() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TARGETS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    targets, factors = torch.randint(0, VOCABULARY, (TARGETS,)), torch.rand(TARGETS)
    total, losses = fused_cross_entropy.fused_cross_entropy(
        hidden, weight, None, targets, factors=factors
    )
    expected = cross_entropy(hidden @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    gradients = torch.autograd.grad(total, (hidden, weight))
    others = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_held_out_losses_are_not_smoothed() -> None:
    data = {"sources": [Source(path="a.txt")]}
    train = Train(global_batch_size=1, steps=1, label_smoothing=SMOOTHING)
    stage = Stage(name="a", kind="cpt", method=Lora(kind="lora"), data=Data(**data), train=train)
    assert build_objective(stage).smoothing == SMOOTHING  # type: ignore[attr-defined]
    held_out = build_objective(EvaluationSet(kind="cpt", **data))
    assert held_out.smoothing == 0.0  # type: ignore[attr-defined]
