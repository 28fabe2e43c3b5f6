"""Compiled attention gives what torch's own gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dtrain.models.attention import Documents, document_attention
from dtrain.models.kernels import native

SIZE = 16


@pytest.fixture(autouse=True)
def loops() -> Iterator[None]:
    assert not native.set_enabled(on=True), "this machine has no compiler"
    yield
    native.set_enabled(on=False)


def tensors(heads: int, shared: int, tokens: int, wide: int = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, heads, SIZE), (1, tokens, shared, SIZE), (1, tokens, shared, wide)]
    # as models hand them over: [1, T, H, D] seen as [1, H, T, D]
    result = [torch.randn(s, generator=generator).transpose(1, 2) for s in shapes]
    return [tensor.requires_grad_() for tensor in result]


def ours(inputs: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    query, key, value = inputs
    module = torch.nn.Identity()
    out, _ = document_attention(module, query, key, value, Documents(lengths, None), scaling=0.3)
    assert type(out.grad_fn).__name__ == "_CausalBackward"
    return out


def theirs(inputs: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    documents = zip(*(tensor.split(lengths, 2) for tensor in inputs), strict=True)
    result = [
        scaled_dot_product_attention(*segment, is_causal=True, scale=0.3, enable_gqa=True)
        for segment in documents
    ]
    return torch.cat(result, 2).transpose(1, 2)


# A block is 64 queries, a tile 256 keys.
@pytest.mark.parametrize("lengths", [(1,), (63,), (64, 1, 65), (257, 3), (700,)])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_output_and_gradients_equal_torch(
    heads: int, shared: int, lengths: tuple[int, ...]
) -> None:
    assert_alike(tensors(heads, shared, sum(lengths)), lengths)


def test_wide_values_and_noncontiguous_inputs() -> None:
    inputs = tensors(4, 2, 67, wide=SIZE + 8)
    spread = [torch.stack([t, t], -1)[..., 0].detach().requires_grad_() for t in inputs]
    assert spread[0].stride(-1) == 2
    assert_alike(spread, (60, 7))


def assert_alike(inputs: list[Tensor], lengths: tuple[int, ...]) -> None:
    outputs = ours(inputs, lengths), theirs(inputs, lengths)
    assert torch.allclose(*outputs, atol=1e-5)
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1))
    ours_grad, theirs_grad = (torch.autograd.grad((o * weights).sum(), inputs) for o in outputs)
    for gradient, expected in zip(ours_grad, theirs_grad, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-4)


def test_infinite_and_nan_inputs_stay_non_finite() -> None:
    inputs = tensors(2, 2, 70)
    with torch.no_grad():
        inputs[0][0, 0, 3, 0] = float("nan")
    out = ours(inputs, (70,))
    assert out[0, 3, 0].isnan().all()
    assert out[0, :3].isfinite().all() and out[0, 4:].isfinite().all()
