"""What a GPU compiles, compiled for this CPU: the same numbers as pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.models.kernels import fused, head, norm, swiglu

TOKENS, WIDTH, VOCABULARY = 7, 64, 96


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def spent() -> tuple[Tensor, Tensor]:
    logits, losses = drawn(TOKENS, VOCABULARY, dtype=torch.float32), torch.empty(TOKENS)
    head._spend_by_torch(logits, losses, torch.arange(TOKENS), True)
    return logits, losses


X, GRADIENT, WEIGHT = drawn(TOKENS, WIDTH), drawn(TOKENS, WIDTH + 1)[:, 1:], drawn(WIDTH)
RSTD = drawn(TOKENS, 1, dtype=torch.float32).abs()
PASSES: dict[str, Callable[[], Any]] = {
    "norm": lambda: norm._normed_by_torch(X, WEIGHT, 1e-5),
    "norm, backward": lambda: norm._input_gradient(GRADIENT, X, WEIGHT, RSTD),
    "swiglu": lambda: swiglu._product_by_torch(X, GRADIENT),
    "swiglu, backward": lambda: swiglu._gradients_by_torch(GRADIENT, X, X),
    "loss": spent,
}


@pytest.mark.parametrize("name", PASSES)
def test_compiled_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = PASSES[name]
    expected = compute()
    monkeypatch.setattr(fused, "compiles", lambda tensor: True)
    before = fused._compiled.cache_info().misses
    with torch.no_grad():
        found = compute()
    assert fused._compiled.cache_info().misses == before + 1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_gpu_that_cannot_compile_is_told_and_computes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    fused._gpu_compiles.cache_clear()
    assert not fused._gpu_compiles()  # there is no GPU
    fused._gpu_compiles.cache_clear()
    assert "torch.compile does not work here" in capsys.readouterr().out
