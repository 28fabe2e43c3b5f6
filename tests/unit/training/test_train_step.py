"""A micro-batch runs forward and backward without device synchronization.

The meta device stands for a GPU: whatever asks it for a number, or for a size that depends on
numbers, raises an error.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
)

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.data.loader import MicroBatch
from dtrain.methods.base import build_method
from dtrain.models import attention
from dtrain.models.kernels import varlen
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.positions import rotate_by_document
from dtrain.objectives.causal_lm import SupervisedFinetuning
from dtrain.training.train_step import compute_loss, poisoned
from tests.micro_batches import micro_batch

META = torch.device("meta")
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "rope_theta": 10000.0, "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "sliding": MistralConfig(**SMALL, sliding_window=4),
    "both kinds of layers, eager": Gemma2Config(**SMALL, head_dim=16, sliding_window=4),
    "longrope": Phi3Config(**SMALL, rope_parameters=LONGROPE, max_position_embeddings=64),
}
LENGTHS = [5, 1, 17, 9]


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if (
            function in copies
            and result.is_meta
            and any(isinstance(a, Tensor) and a.is_cpu and a.dim() for a in args)
        ):
            self.count += 1
        return result


@pytest.fixture(autouse=True)
def autocast_knows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's autocast raises an error for the meta device, which has none."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *args, **named: autocast("cpu" if kind == "meta" else kind, *args, **named),
    )


def batch(lengths: list[int]) -> MicroBatch:
    return micro_batch(torch.arange(sum(lengths)), lengths)


def engine(config: PretrainedConfig, method: Any, kernels: str, *, recomputes: bool) -> Any:
    config._attn_implementation = "eager" if isinstance(config, Gemma2Config) else attention.NAME
    with META:
        base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        if recomputes:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model: nn.Module = build_method(method).attach(base, seed=0, device=META)
    rotate_by_document(model)
    apply_kernels(model, schema.Model(base="none", kernels=kernels))  # type: ignore[arg-type]
    world = SimpleNamespace(device=META)
    return SimpleNamespace(world=world, model=model.train(), autocast=nullcontext)


def forward_backward(job: Any, lengths: list[int]) -> int:
    """Return how many copies to the device it took."""
    with Copies() as copies:
        output = compute_loss(job, OBJECTIVE, batch(lengths))
        (poisoned(output.loss) * 0.5).backward()
    assert output.item_losses.is_meta
    assert any(p.grad is not None for p in job.model.parameters())
    return copies.count


OBJECTIVE = SupervisedFinetuning(None)  # type: ignore[arg-type]
METHODS = {
    "lora": Lora(kind="lora", r=4, dropout=0.0),
    "full": Full(kind="full"),
}


@pytest.mark.parametrize("lengths", [LENGTHS, [32], [1, 31]], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("name", CONFIGS)
def test_step_does_not_synchronize_with_the_device(
    name: str, kernels: str, lengths: list[int]
) -> None:
    forward_backward(engine(CONFIGS[name], METHODS["lora"], kernels, recomputes=False), lengths)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_and_recomputation_do_not_synchronize(method: str, recomputes: bool) -> None:
    job = engine(CONFIGS["llama"], METHODS[method], "auto", recomputes=recomputes)
    forward_backward(job, LENGTHS)


@pytest.mark.parametrize("takes_groups", [True, False], ids=["groups", "torch 2.11"])
@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_document_boundaries_are_copied_once_for_all_layers(
    name: str, takes_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newer(
        q: Tensor, k: Tensor, v: Tensor, *rest: Any,
        scale: Any = None, window_size: Any = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa and k.shape[1] == v.shape[1] == 2
        return q + (k.sum() + v.sum()) * 0

    def older(
        q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: Any = None, window_size: Any = None
    ) -> Tensor:
        assert k.shape == v.shape == q.shape
        return q + (k.sum() + v.sum()) * 0

    monkeypatch.setattr(varlen, "load_torch_varlen", lambda: newer if takes_groups else older)
    monkeypatch.setattr(varlen, "supports_varlen", lambda *_, **__: True)
    job = engine(CONFIGS[name], METHODS["lora"], "auto", recomputes=True)
    batch_tensors = 4  # the micro-batch's tensors
    assert forward_backward(job, LENGTHS) == batch_tensors + 1


def test_synchronization_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_known_documents", lambda *row: None)
    job = engine(CONFIGS["llama"], METHODS["lora"], "auto", recomputes=False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        forward_backward(job, LENGTHS)
