"""The compiled passes of a merge give torch's values, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtrain.models.kernels import merge_rounding

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(merge_rounding, "_load", lambda: None)
    else:
        assert merge_rounding._loops() is not None


def values(count: int = 10_007) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count) * torch.logspace(-30, 3, count)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_product_is_rounded_before_the_sum(dtype: torch.dtype) -> None:
    old, added = values().to(dtype), values().flip(0)
    expected = added.mul(1.7).add(old.float())
    result = merge_rounding.add_scaled(old, added.clone(), 1.7)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_finite_value_is_rounded_as_torch_does(dtype: torch.dtype) -> None:
    anything = torch.randint(-(2**31), 2**31 - 1, (200_001,)).int().view(torch.float32)
    finite = anything[anything.to(dtype).isfinite()]
    rounded = torch.empty(len(finite), dtype=dtype)
    assert merge_rounding.round_into(finite, rounded)
    assert torch.equal(rounded.view(torch.uint8), finite.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("index", [0, 5_000, 10_006])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_non_finite_after_rounding_is_detected(odd: float, index: int) -> None:
    tensor = values()
    tensor[index] = odd
    assert not merge_rounding.round_into(tensor, torch.empty(len(tensor), dtype=torch.bfloat16))
