"""The loss of each token by the fused head: values and gradients of torch's cross entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from dtrain.models.kernels import fused_cross_entropy
from dtrain.models.kernels.fused_cross_entropy import token_cross_entropy

TOKENS, WIDTH, VOCABULARY = 7, 16, 24
SCALES = torch.linspace(-1.5, 2.0, TOKENS)  # the gradient of each token's loss


def soft_cap(logits: Tensor) -> Tensor:
    return 3.0 * torch.tanh(logits / 3.0)


def tensors(*, bias: bool, trains: bool) -> list[Tensor | None]:
    """Hidden states, output matrix and bias, as leaves."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=trains)
    added = torch.randn(VOCABULARY, generator=generator, requires_grad=trains) if bias else None
    return [hidden, weight, added]


def gradients(leaves: list[Tensor | None], losses: Tensor) -> list[Tensor | None]:
    (losses * SCALES).sum().backward()
    return [None if leaf is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("adjust", [None, soft_cap], ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_losses_and_gradients_are_those_of_torch(
    adjust: Any, bias: bool, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda vocabulary: 3)
    targets = torch.arange(TOKENS) * 3
    expected_leaves, leaves = tensors(bias=bias, trains=trains), tensors(bias=bias, trains=trains)
    logits = linear(*expected_leaves)  # type: ignore[arg-type]
    expected = cross_entropy(adjust(logits) if adjust else logits, targets, reduction="none")
    losses = token_cross_entropy(*leaves, targets, adjust)  # type: ignore[arg-type]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for found, right in zip(
        gradients(leaves, losses), gradients(expected_leaves, expected), strict=True
    ):
        assert (found is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_equal_scales_give_the_gradient_of_the_sum() -> None:
    targets = torch.arange(TOKENS)
    leaves, other = tensors(bias=False, trains=False), tensors(bias=False, trains=False)
    token_cross_entropy(*leaves, targets).sum().backward()  # type: ignore[arg-type]
    fused_cross_entropy.fused_cross_entropy(*other, targets)[0].backward()  # type: ignore[arg-type]
    torch.testing.assert_close(leaves[0].grad, other[0].grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_no_target_reaches_the_parameters_with_zeros(trains: bool) -> None:
    _, weight, _ = tensors(bias=False, trains=trains)
    assert weight is not None
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    losses = token_cross_entropy(hidden, weight, None, torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, WIDTH)
    assert not trains or (weight.grad is not None and not weight.grad.any())


def test_half_precision_under_autocast_gives_float32_losses() -> None:
    leaves = tensors(bias=False, trains=False)
    targets = torch.arange(TOKENS)
    exact = token_cross_entropy(*leaves, targets)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        losses = token_cross_entropy(*leaves, targets)  # type: ignore[arg-type]
    losses.sum().backward()
    assert losses.dtype == torch.float32 and leaves[0].grad.dtype == torch.float32  # type: ignore
    torch.testing.assert_close(losses, exact, rtol=2e-2, atol=2e-2)


def test_without_a_gradient_nothing_is_kept() -> None:
    leaves = tensors(bias=True, trains=True)
    with torch.no_grad():
        losses = token_cross_entropy(*leaves, torch.arange(TOKENS))  # type: ignore[arg-type]
    assert not losses.requires_grad
