"""Attention in blocks gives what torch's own gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dtrain.models.kernels.causal import BLOCK, FASTER, causal_attention, is_faster

D = 16


def tensors(heads: int, shared: int, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, h, D) for h in (heads, shared, shared)]
    # as models hand them over: [1, n, H, D] seen as [1, H, n, D]
    found = [torch.randn(s, generator=generator).transpose(1, 2) for s in shapes]
    return [tensor.requires_grad_() for tensor in found]


@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_output_and_gradients_are_those_of_torch(heads: int, shared: int, tokens: int) -> None:
    given = tensors(heads, shared, tokens)
    ours = causal_attention(*given, 0.3)
    theirs = scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad((o * weights).sum(), given) for o in (ours, theirs))
    for gradient, expected in zip(found, wanted, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-4)


def test_values_may_be_wider_than_keys() -> None:
    query, key, _ = tensors(4, 2, BLOCK + 3)
    value = torch.randn(1, 2, BLOCK + 3, D + 8, requires_grad=True)
    given = [query, key, value]
    ours = causal_attention(*given, 0.3)
    theirs = scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=1e-5)
    found, wanted = (torch.autograd.grad(o.square().sum(), given) for o in (ours, theirs))
    for gradient, expected in zip(found, wanted, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-4)


def test_it_is_chosen_where_it_was_measured_to_be_faster() -> None:
    short, right, long = (tensors(2, 2, n)[0] for n in (FASTER[0] - 1, FASTER[0], FASTER[-1] + 1))
    assert [is_faster(q) for q in (short, right, long)] == [False, True, False]
    assert not is_faster(right.bfloat16())
