"""Kernels leave modules alone that hooks, patches or subclasses change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config.methods import Lora
from dtrain.methods.base import build_method
from dtrain.models import attention
from dtrain.models.dropout import set_dropout_key
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.loss import target_losses
from tests.micro_batches import fill_lora_b, micro_batch

LORA = Lora(kind="lora", r=4)
PARTS = {
    "norm": "model.layers.0.input_layernorm",
    "MLP": "model.layers.0.mlp",
    "activation": "model.layers.0.mlp.act_fn",
    "attention": "model.layers.0.self_attn",
    "adapted layer": "model.layers.0.self_attn.q_proj",
    "output layer": "lm_head",
    "model": "",
}


def larger(output: Any) -> Any:
    """What a module gives, a little larger."""
    if isinstance(output, Tensor):
        return output * 1.3
    if isinstance(output, tuple):
        return output[0] * 1.3, *output[1:]
    output.logits = output.logits * 1.3
    return output


def patched(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: larger(forward(*args, **kwargs))


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, args, output: larger(output))


def subclassed(module: nn.Module) -> None:
    original = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return larger(original.forward(self, *args, **kwargs))

    module.__class__ = type("Changed", (original,), {"forward": forward})


def losses(change: Callable[[nn.Module], None], submodule: str, *, kernels: bool) -> Tensor:
    """The loss, and the gradients of all that trains."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention.NAME,
        )
    ).requires_grad_(False)  # fmt: skip
    change(model.get_submodule(PARTS[submodule]))
    adapted = build_method(LORA).attach(model, seed=0)
    fill_lora_b(adapted, std=0.3)
    if kernels:
        patch_modules(adapted)
    lengths = [9, 14]
    row = micro_batch(torch.arange(sum(lengths)) % 64, lengths, [3])
    set_dropout_key(adapted, 1, 2, row.sequences, row.sequence_lengths)
    loss = target_losses(adapted, row)[0]
    loss.backward()
    gradients = [p.grad.flatten() for p in adapted.parameters() if p.grad is not None]
    return torch.cat([loss.detach().view(1), *gradients])


@pytest.mark.parametrize("submodule", PARTS)
@pytest.mark.parametrize("change", [patched, hooked, subclassed])
def test_kernels_respect_changed_modules(
    change: Callable[[nn.Module], None], submodule: str
) -> None:
    plain, fast = (losses(change, submodule, kernels=kernels) for kernels in (False, True))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    unchanged = losses(lambda module: None, submodule, kernels=False)
    assert not torch.allclose(plain, unchanged, rtol=1e-3)
