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
    assert not native.switch(on=True), "this machine has no compiler"
    yield
    native.switch(on=False)


def tensors(heads: int, shared: int, tokens: int, wide: int = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, heads, SIZE), (1, tokens, shared, SIZE), (1, tokens, shared, wide)]
    # as models hand them over: [1, T, H, D] seen as [1, H, T, D]
    found = [torch.randn(s, generator=generator).transpose(1, 2) for s in shapes]
    return [tensor.requires_grad_() for tensor in found]


def ours(given: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    query, key, value = given
    module = torch.nn.Identity()
    out, _ = document_attention(module, query, key, value, Documents(lengths, None), scaling=0.3)
    assert type(out.grad_fn).__name__ == "_CausalBackward"
    return out


def theirs(given: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(tensor.split(lengths, 2) for tensor in given), strict=True)
    found = [
        scaled_dot_product_attention(*part, is_causal=True, scale=0.3, enable_gqa=True)
        for part in parts
    ]
    return torch.cat(found, 2).transpose(1, 2)


# A block is 64 queries, a tile 256 keys.
@pytest.mark.parametrize("lengths", [(1,), (63,), (64, 1, 65), (257, 3), (700,)])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_output_and_gradients_are_those_of_torch(
    heads: int, shared: int, lengths: tuple[int, ...]
) -> None:
    assert_alike(tensors(heads, shared, sum(lengths)), lengths)


def test_values_may_be_wider_than_keys_and_inputs_of_any_layout() -> None:
    given = tensors(4, 2, 67, wide=SIZE + 8)
    spread = [torch.stack([t, t], -1)[..., 0].detach().requires_grad_() for t in given]
    assert spread[0].stride(-1) == 2
    assert_alike(spread, (60, 7))


def assert_alike(given: list[Tensor], lengths: tuple[int, ...]) -> None:
    outputs = ours(given, lengths), theirs(given, lengths)
    assert torch.allclose(*outputs, atol=1e-5)
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad((o * weights).sum(), given) for o in outputs)
    for gradient, expected in zip(found, wanted, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-4)


def test_what_was_infinite_or_no_number_stays_so() -> None:
    given = tensors(2, 2, 70)
    with torch.no_grad():
        given[0][0, 0, 3, 0] = float("nan")
    out = ours(given, (70,))
    assert out[0, 3, 0].isnan().all()
    assert out[0, :3].isfinite().all() and out[0, 4:].isfinite().all()
