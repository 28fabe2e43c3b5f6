"""Products by oneDNN equal torch's for any strides; unsupported tensors go to torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from dtrain.models.kernels import matmul

TOKENS, INNER, OUTER = 37, 48, 29
ONEDNN_PAYS = matmul.prefers_onednn


@pytest.fixture(autouse=True, params=[True, False], ids=["onednn", "torch"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on each maker's processors."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: request.param)
    return bool(request.param)


def filled(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [None, filled(OUTER)])
@pytest.mark.parametrize(
    "x", [filled(TOKENS, INNER), filled(INNER, TOKENS).t(), filled(1, INNER).expand(TOKENS, -1)],
    ids=["plain", "transposed", "expanded"],
)  # fmt: skip
@pytest.mark.parametrize(
    "weight",
    [
        filled(OUTER, INNER), filled(INNER, OUTER).t(),
        filled(1, INNER).expand(OUTER, -1), filled(OUTER, 2 * INNER)[:, :INNER],
    ],
    ids=["plain", "transposed", "expanded", "part"],
)  # fmt: skip
def test_products_equal_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = torch.nn.functional.linear(x, weight, bias)
    assert_close(matmul.linear(x, weight, bias), expected)
    assert_close(matmul.mm(x, weight.t()), x @ weight.t())
    assert_close(matmul.addmm(expected.clone(), x, weight.t()), expected + x @ weight.t())


def test_products_are_deterministic() -> None:
    x, weight = filled(300, 576), filled(1536, 576)
    assert torch.equal(matmul.linear(x, weight), matmul.linear(x.clone(), weight.clone()))


def test_float32_uses_the_faster_library(by_onednn: bool) -> None:
    with torch.profiler.profile() as result:
        matmul.mm(matmul.linear(filled(TOKENS, INNER), filled(OUTER, INNER)), filled(OUTER, INNER))
    names = [event.key for event in result.key_averages()]
    assert ("mkldnn::_linear_pointwise" in names) == by_onednn
    assert ("aten::mm" in names) == (not by_onednn)


def test_unsupported_tensors_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = filled(TOKENS, INNER), filled(OUTER, INNER)
    half = matmul.linear(x.bfloat16(), weight.bfloat16())
    assert_close(half, x.bfloat16() @ weight.bfloat16().t())
    assert matmul.mm(x[:0], weight.t()).shape == (0, OUTER)
    with FakeTensorMode() as fake:
        assert matmul.linear(fake.from_tensor(x), fake.from_tensor(weight)).shape == (37, 29)
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: False)
    assert torch.equal(matmul.linear(x, weight), x @ weight.t())
    assert torch.equal(matmul.addmm(torch.zeros(37, 29), x, weight.t()), x @ weight.t())


@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel", None])
def test_onednn_only_on_amd(maker: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path, **_: str) -> str:
        if maker is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {maker}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    result = ONEDNN_PAYS.__wrapped__()
    assert result == (maker == "AuthenticAMD" and torch.backends.mkldnn.is_available())
