"""A model may write in place into the outputs of kernels, as into those of its own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

from dtrain.models.kernels import native
from dtrain.models.kernels.patch import patch_modules

CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x.add_(0.5),
    "multiply": lambda x: x.mul_(1.5),
    "part": lambda x: x[..., :4].mul_(2.0),
}
MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "input_layernorm", "post_attention_layernorm", "norm", "mlp", "self_attn", "lm_head",
)  # fmt: skip


class Writes(nn.Module):
    """Gives what a module gives, written into."""

    def __init__(self, inner: nn.Module, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.write = inner, write

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        self.write(output[0] if isinstance(output, tuple) else output)
        return output


def gradients(fast: bool, module: str, write: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).requires_grad_(False)
    adapted: Any = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    if fast:
        patch_modules(adapted)
    for name, child in list(adapted.named_modules()):
        if name.rsplit(".", 1)[-1] == module:
            parent, _, last = name.rpartition(".")
            setattr(adapted.get_submodule(parent), last, Writes(child, WRITES[write]))
    ids = torch.arange(12).view(1, -1)
    output = adapted(input_ids=ids, use_cache=False).logits
    output.float().logsumexp(-1).sum().backward()
    return {
        n.replace(".inner", ""): p.grad for n, p in adapted.named_parameters() if p.grad is not None
    }


@pytest.fixture(autouse=True, params=[True, False], ids=["loops", "torch"])
def who_computes(request: pytest.FixtureRequest) -> Any:
    native.set_enabled(on=request.param)
    yield
    native.set_enabled(on=False)


def check_written(module: str, write: str) -> None:
    result, expected = (gradients(fast, module, write) for fast in (True, False))
    assert result.keys() == expected.keys() and result
    for name, gradient in result.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("module", MODULES)
def test_gradients_equal_the_unpatched_model(module: str, write: str) -> None:
    check_written(module, write)


@pytest.mark.parametrize("write", WRITES)
def test_rotary_outputs_can_be_written_in_place(
    write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = llama.eager_attention_forward

    def attend(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
        WRITES[write](query), WRITES[write](key)
        return plain(module, query, key, *rest, **more)

    monkeypatch.setattr(CONFIG, "_attn_implementation", "eager")
    monkeypatch.setattr(llama, "eager_attention_forward", attend)
    check_written("none", write)
