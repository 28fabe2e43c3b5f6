"""Functions compiled for GPUs give the uncompiled results; compiled here for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config.methods import Full, Lora
from dtrain.data.loader import MicroBatch
from dtrain.methods.base import build_method
from dtrain.models.dropout import set_dropout_key
from dtrain.models.kernels import compiled, elementwise, fused_cross_entropy
from dtrain.models.kernels.patch import compile_ahead, patch_modules
from dtrain.models.loss import target_losses

TOKENS, WIDTH, VOCABULARY = 7, 64, 96


def random_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def spent() -> tuple[Tensor, Tensor]:
    logits, losses = random_tensor(TOKENS, VOCABULARY, dtype=torch.float32), torch.empty(TOKENS)
    fused_cross_entropy._cross_entropy_by_torch(logits, losses, torch.arange(TOKENS), True)
    return logits, losses


X, GRADIENT, WEIGHT = (
    random_tensor(TOKENS, WIDTH),
    random_tensor(TOKENS, WIDTH + 1)[:, 1:],
    random_tensor(WIDTH),
)
RSTD = random_tensor(TOKENS, 1, dtype=torch.float32).abs()
PASSES: dict[str, Callable[[], Any]] = {
    "norm": lambda: elementwise._norm_and_rstd_by_torch(X, WEIGHT, 1e-5),
    "norm, backward": lambda: elementwise._input_gradient(GRADIENT, X, WEIGHT, RSTD),
    "swiglu": lambda: elementwise._product_by_torch(X, GRADIENT),
    "swiglu, backward": lambda: elementwise._product_gradients_by_torch(GRADIENT, X, X),
    "loss": spent,
}


@pytest.mark.parametrize("name", PASSES)
def test_compiled_functions_equal_uncompiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = PASSES[name]
    expected = compute()
    monkeypatch.setattr(compiled, "should_compile", lambda tensor: True)
    before = compiled._compiled.cache_info().misses
    with torch.no_grad():
        results = compute()
    assert compiled._compiled.cache_info().misses == before + 1
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)


def test_gpu_without_compiler_warns_and_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    compiled._gpu_compiles.cache_clear()
    assert not compiled._gpu_compiles()  # there is no GPU
    compiled._gpu_compiles.cache_clear()
    assert "torch.compile does not work here" in capsys.readouterr().out


def fails_at(number: int, error: Exception, *, after_writing: bool = False) -> Any:
    """A compiler whose function raises an error when it is called for that time."""
    calls = 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls < number:
                return function(*args)
            if after_writing:
                args[0].add_(1.0)
            raise error

        call.calls = lambda: calls  # type: ignore[attr-defined]
        return call

    return cache(failing)


@pytest.fixture
def everything_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "should_compile", lambda tensor: True)
    monkeypatch.setattr(compiled, "_failed", set())


@pytest.mark.usefixtures("everything_compiles")
@pytest.mark.parametrize("number", [1, 3])
def test_function_that_fails_to_compile_runs_uncompiled(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = fails_at(number, RuntimeError("no such instruction\nmore"))
    monkeypatch.setattr(compiled, "_compiled", failing)
    expected = torch.nn.functional.silu(X) * GRADIENT
    for _ in range(number + 3):
        torch.testing.assert_close(elementwise._product_by_torch(X, GRADIENT), expected)
    assert failing(elementwise._product_by_torch.__wrapped__).calls() == number
    out = capsys.readouterr().out
    assert out.count("_product_by_torch does not compile here") == 1
    assert "no such instruction" in out


@pytest.mark.usefixtures("everything_compiles")
@pytest.mark.parametrize(
    ("error", "writes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY"), False),
        (RuntimeError("an illegal instruction"), True),
    ],
)
def test_other_errors_are_raised(
    error: Exception, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_compiled", fails_at(1, error, after_writing=writes))
    with pytest.raises(type(error)):
        elementwise._product_by_torch(X.clone(), GRADIENT)


def test_strict_runs_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_gpu_compiles", lambda: True)
    tensor = SimpleNamespace(is_cuda=True, shape=(4, 8), numel=lambda: 32)
    monkeypatch.setattr(compiled, "PLAIN", (SimpleNamespace,))
    assert compiled.should_compile(tensor)
    compiled.set_enabled(on=False)
    assert not compiled.should_compile(tensor)
    compiled.set_enabled(on=True)
    one_token = SimpleNamespace(is_cuda=True, shape=(1, 1, 8), numel=lambda: 8)
    assert not compiled.should_compile(one_token)


@pytest.mark.usefixtures("everything_compiles")
@pytest.mark.parametrize("full", [False, True])
def test_compile_ahead_covers_every_kernel_of_a_step(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=True, backend=count)

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    graphs: list[Any] = []
    torch._dynamo.reset()
    monkeypatch.setattr(
        compiled, "should_compile", lambda tensor: tensor.numel() > tensor.shape[-1]
    )
    monkeypatch.setattr(compiled, "_compiled", cache(traced))
    compile_ahead(torch.device("cpu"), torch.float32, trains_base=full)
    ahead = len(graphs)
    config = LlamaConfig(
        vocab_size=200, hidden_size=48, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).requires_grad_(False)
    method: Any = Full(kind="full") if full else Lora(kind="lora", r=4, dropout=0.1)
    model = build_method(method).attach(base, seed=0).train()
    patch_modules(model)
    for tokens in (33, 2, 5):
        positions = torch.arange(tokens)
        set_dropout_key(model, 0, 0, [0], [tokens])
        row = MicroBatch(
            positions[None], positions[None], positions[:-1], positions[1:], [tokens], [0], [tokens]
        )
        target_losses(model, row)[0].backward()
    assert ahead == len(graphs) == (8 if full else 7)
