"""Products by oneDNN: torch's own numbers, whatever the strides, and no one who asks in vain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from dtrain.models.kernels import matmul
from dtrain.models.kernels.matmul import add_times, times, times_transposed

TOKENS, INNER, OUTER = 37, 48, 29
ONEDNN_PAYS = matmul.onednn_pays


@pytest.fixture(autouse=True, params=[True, False], ids=["onednn", "torch"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on each maker's processors."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "onednn_pays", lambda: request.param)
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
def test_they_are_torchs_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = torch.nn.functional.linear(x, weight, bias)
    assert_close(times_transposed(x, weight, bias), expected)
    assert_close(times(x, weight.t()), x @ weight.t())
    assert_close(add_times(expected.clone(), x, weight.t()), expected + x @ weight.t())


def test_the_same_product_twice_is_the_same_to_the_bit() -> None:
    x, weight = filled(300, 576), filled(1536, 576)
    assert torch.equal(times_transposed(x, weight), times_transposed(x.clone(), weight.clone()))


def test_float32_is_multiplied_by_the_faster(by_onednn: bool) -> None:
    with torch.profiler.profile() as found:
        times(times_transposed(filled(TOKENS, INNER), filled(OUTER, INNER)), filled(OUTER, INNER))
    names = [event.key for event in found.key_averages()]
    assert ("mkldnn::_linear_pointwise" in names) == by_onednn
    assert ("aten::mm" in names) == (not by_onednn)


def test_what_onednn_cannot_take_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = filled(TOKENS, INNER), filled(OUTER, INNER)
    half = times_transposed(x.bfloat16(), weight.bfloat16())
    assert_close(half, x.bfloat16() @ weight.bfloat16().t())
    assert times(x[:0], weight.t()).shape == (0, OUTER)
    with FakeTensorMode() as fake:
        assert times_transposed(fake.from_tensor(x), fake.from_tensor(weight)).shape == (37, 29)
    monkeypatch.setattr(matmul, "onednn_pays", lambda: False)
    assert torch.equal(times_transposed(x, weight), x @ weight.t())
    assert torch.equal(add_times(torch.zeros(37, 29), x, weight.t()), x @ weight.t())


@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel", None])
def test_onednn_is_for_amd(maker: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        if maker is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {maker}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    found = ONEDNN_PAYS.__wrapped__()
    assert found == (maker == "AuthenticAMD" and torch.backends.mkldnn.is_available())
