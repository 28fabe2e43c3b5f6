"""Every NaN and infinity is detected."""

from __future__ import annotations

import pytest
import torch

from dtrain.distributed.tensor_utils import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [0, 517, 1030])
def test_every_non_finite_value_is_detected(dtype: torch.dtype, value: float, index: int) -> None:
    tensor = torch.randn(1031).to(dtype)
    assert all_finite(tensor)
    tensor[index] = value
    assert not all_finite(tensor)
    tensor.fill_(value)
    assert not all_finite(tensor)


def test_largest_numbers_and_empty_tensors_are_finite() -> None:
    assert all_finite(torch.full((1000,), torch.finfo(torch.float32).max))
    assert all_finite(torch.zeros(0))
