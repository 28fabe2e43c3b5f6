"""FLOPs, saved bytes and operations of a step: figures that do not depend on timing.

They are committed in tests/golden/step_counts.json and may only fall. To rewrite them:
`DTRAIN_WRITE_GOLDEN=1 pytest tests/unit/models/kernels/test_step_counts.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.data.loader import MicroBatch
from dtrain.methods.base import build_method
from dtrain.models import attention
from dtrain.models.dropout import set_dropout_key
from dtrain.models.kernels import native
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.loss import target_losses
from tests.micro_batches import micro_batch

GOLDEN = Path(__file__).parents[3] / "golden" / "step_counts.json"
LENGTHS = [50, 150, 56]
TOKENS, RANK, VOCABULARY = sum(LENGTHS), 16, 4096
# The proportions of SmolLM2-135M.
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=2,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
LORA = Lora(kind="lora", r=RANK, dropout=0.0)
METHODS: dict[str, Full | Lora] = {
    "lora": LORA,
    "lora with dropout": LORA.model_copy(update={"dropout": 0.05}),
    "full": Full(kind="full"),
}


def attention_flops(query: Any, key: Any, *rest: Any, **named: Any) -> int:
    """Two products of n x n and n x D for each head, masked halves included."""
    _, heads, tokens, size = query
    return 4 * heads * tokens * key[2] * size


def attention_backward_flops(gradient: Any, query: Any, key: Any, *rest: Any, **named: Any) -> int:
    """Five such products, as the weights are recomputed."""
    return attention_flops(query, key) * 5 // 2


def added_flops(to: Any, left: Any, right: Any, **named: Any) -> int:
    """FLOPs of `to.addmm_(left, right)`."""
    return 2 * left[0] * left[1] * right[1]


def batched_flops(to: Any, left: Any, right: Any, **named: Any) -> int:
    """FLOPs of `to.baddbmm_(left, right)`."""
    return left[0] * added_flops(to, left[1:], right[1:])


def linear_flops(x: Any, weight: Any, *rest: Any, **named: Any) -> int:
    """FLOPs of x Wᵀ + b, given x, W, b; or of a sum, given x, what it is added to, W."""
    matrix = rest[0] if rest[0] is not None and len(rest[0]) == 2 else weight
    return 2 * x[0] * x[1] * matrix[0]


# What torch's counter does not know.
COUNTED = {
    torch.ops.mkldnn._linear_pointwise: linear_flops,
    torch.ops.aten.addmm_: added_flops,
    torch.ops.aten.baddbmm_: batched_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


@dataclass
class Counts:
    """Counts of one forward and backward pass."""

    flops: int
    saved_bytes: int
    calls: int


class Calls(TorchDispatchMode):
    """Counts operations that compute, not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def build(method: Full | Lora, kernels: str, attention_name: str) -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG).requires_grad_(False)
    base.set_attn_implementation(attention_name)
    base.config.use_cache = False
    model = build_method(method).attach(base, seed=0)
    apply_kernels(model, schema.Model(base="none", kernels=kernels))  # type: ignore[arg-type]
    return model


def batch() -> MicroBatch:
    return micro_batch(torch.arange(TOKENS) % VOCABULARY, LENGTHS)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass saves for backward, each storage once, without parameters."""
    parameter_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(
        t.untyped_storage().nbytes()
        for address, t in kept.items()
        if address not in parameter_storages
    )


@cache
def measured(
    method: str,
    kernels: str = "auto",
    attention_name: str = attention.NAME,
    *,
    loops: bool = False,  # torch does not see into them
) -> Counts:
    model, row = build(METHODS[method], kernels, attention_name), batch()
    native.set_enabled(on=loops)

    def forward() -> Tensor:
        set_dropout_key(model, 0, 0, row.sequences, row.sequence_lengths)
        return target_losses(model, row)[0]

    saved = saved_bytes(model, forward)
    model.zero_grad()
    with Calls() as calls, FlopCounterMode(display=False, custom_mapping=COUNTED) as flops:
        forward().backward()
    return Counts(flops.get_total_flops(), saved, calls.count)


@pytest.fixture(autouse=True)
def no_loops() -> Iterator[None]:
    yield
    native.set_enabled(on=False)


@pytest.mark.parametrize("method", METHODS)
def test_step_costs_no_more_than_the_golden_counts(method: str) -> None:
    counts = asdict(measured(method))
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if "DTRAIN_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(json.dumps(known | {method: counts}, indent=2) + "\n")
        return
    more = {quantity: (count, known[method][quantity]) for quantity, count in counts.items()}
    assert all(count <= committed for count, committed in more.values()), more


def test_flops_are_minimal() -> None:
    """Tokens pass the weights twice, adapter matrices three times; only targets pass the head."""
    q, kv, h, inner = 576, 192, 576, 1536
    layers = [(h, q), (h, kv), (h, kv), (q, h), (h, inner), (h, inner), (inner, h)]
    frozen = sum(a * b for a, b in layers)
    adapters = sum(RANK * (a + b) for a, b in layers)
    head = 4 * VOCABULARY * h * (TOKENS - len(LENGTHS))
    attended = (4 + 10) * q * sum(n * n for n in LENGTHS)
    minimum = CONFIG.num_hidden_layers * (TOKENS * (4 * frozen + 6 * adapters) + attended) + head
    minimum -= TOKENS * 2 * sum(a * b for a, b in layers[:3])  # nothing learns below the first
    ratio = measured("lora").flops / minimum
    print(f"{ratio:.4f}x the least arithmetic")
    assert ratio <= 1.02


def test_saved_memory_is_below_peft_and_transformers() -> None:
    ours, theirs = measured("lora"), measured("lora", "off", "sdpa")
    ratio = ours.saved_bytes / theirs.saved_bytes
    print(f"{ratio:.3f}x the bytes, {ours.calls / theirs.calls:.2f}x the calls")
    assert ratio <= 0.6


@pytest.mark.parametrize("method", METHODS)
def test_loops_save_no_more_memory_and_call_fewer_operations(method: str) -> None:
    ours, torchs = measured(method, loops=True), measured(method)
    assert ours.saved_bytes <= torchs.saved_bytes
    assert ours.calls < torchs.calls
