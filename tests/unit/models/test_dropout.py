"""Dropout masks belong to sequences: not to ranks, micro-batches or recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from dtrain.config.methods import Lora
from dtrain.core.errors import UserError
from dtrain.methods.base import build_method
from dtrain.models.dropout import DropoutKey, KeyedDropout, set_dropout_key, uneven_layers
from dtrain.models.kernels import native
from dtrain.models.meta_model import build_meta_model

LENGTHS = {7: 12, 8: 20}  # tokens of each sequence


def layer(p: float = 0.3, name: str = "a", seed: int = 1, step: int = 2) -> KeyedDropout:
    return KeyedDropout(p, name, DropoutKey(seed, step)).train()


def masks(dropout: KeyedDropout, sequences: list[int], width: int = 16) -> Tensor:
    lengths = [LENGTHS[s] for s in sequences]
    dropout.key.sequences, dropout.key.lengths = sequences, lengths
    return dropout(torch.ones(1, sum(lengths), width))[0]


def test_masks_do_not_depend_on_the_micro_batch() -> None:
    together = masks(layer(), [7, 8])
    assert torch.equal(together, torch.cat([masks(layer(), [7]), masks(layer(), [8])]))
    assert torch.equal(masks(layer(), [8, 7]), torch.cat([together[12:], together[:12]]))


@pytest.mark.parametrize("shape", [(32, 16), (1, 1, 32, 16), (1, 32, 4, 4)])
def test_masks_do_not_depend_on_how_a_layer_gets_the_tokens(shape: tuple[int, ...]) -> None:
    """Qwen's shared experts get rows, the keys of DeepSeek another dimension."""
    dropout = layer()
    expected = masks(dropout, [7, 8])
    output = dropout(torch.ones(shape))
    assert output.shape == shape and torch.equal(output.reshape(32, 16), expected)


def test_masks_do_not_depend_on_earlier_random_numbers() -> None:
    first = masks(layer(), [7])
    torch.rand(100)
    assert torch.equal(masks(layer(), [7]), first)


@pytest.mark.parametrize("change", [{"name": "b"}, {"seed": 9}, {"step": 3}])
def test_every_part_of_the_key_changes_the_mask(change: dict[str, int]) -> None:
    assert not torch.equal(masks(layer(), [7]), masks(layer(**change), [7]))  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropped_share_and_mean(p: float) -> None:
    output = masks(layer(p), [7, 8], width=20_000)
    assert (output == 0).float().mean().item() == pytest.approx(p, abs=0.002)
    assert output.mean().item() == pytest.approx(1.0, abs=0.005)


def test_masks_of_neighboring_sequences_are_independent() -> None:
    LENGTHS[9] = LENGTHS[10] = 50
    both = (masks(layer(0.5), [9], 2000) == 0) & (masks(layer(0.5), [10], 2000) == 0)
    assert both.float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_gradient_uses_the_same_mask() -> None:
    dropout = layer()
    dropout.key.sequences, dropout.key.lengths = [7], [12]
    x = torch.randn(1, 12, 16, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(dropout, (x,))


def test_evaluation_and_empty_micro_batches_drop_nothing() -> None:
    dropout = layer()
    x = torch.ones(1, 1, 16)
    set_dropout_key(nn.Sequential(dropout), 1, 1, [], [])
    assert torch.equal(dropout(x), x)
    assert torch.equal(dropout.eval()(torch.ones(3, 5, 16)), torch.ones(3, 5, 16))


@pytest.mark.parametrize("rows", [13, 24, 1])
def test_other_rows_than_the_tokens_are_refused(rows: int) -> None:
    """ProphetNet computes several of each token, Zaya one in front of all."""
    dropout = layer()
    set_dropout_key(nn.Sequential(dropout), 1, 1, [7], [12])
    with pytest.raises(UserError, match=f"a computes {rows} rows for 12 tokens"):
        dropout(torch.ones(1, rows, 16))


def adapted(checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    method = Lora(kind="lora", r=4, dropout=0.2)
    return with_live_b(build_method(method).attach(model, seed=3))


def with_live_b(model: nn.Module) -> nn.Module:
    """B starts at zero, which would hide the masks from the loss."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


def gradients(model: nn.Module, micro_batches: list[list[int]]) -> Tensor:
    """Gradients of the summed logits of sequences 7 and 8, split into these micro-batches."""
    generator = torch.Generator().manual_seed(5)
    ids = {s: torch.randint(0, 64, (n,), generator=generator) for s, n in {7: 12, 8: 20}.items()}
    for sequences in micro_batches:
        lengths = [len(ids[s]) for s in sequences]
        set_dropout_key(model, 1, 2, sequences, lengths)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        row = torch.cat([ids[s] for s in sequences])[None]
        model(
            input_ids=row, position_ids=positions, use_cache=False
        ).logits.square().sum().backward()
    result = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(result)


def test_same_training_with_any_micro_batch_and_with_checkpointing() -> None:
    one_by_one = gradients(adapted(False), [[7], [8]])
    together = gradients(adapted(False), [[7, 8]])
    recomputed = gradients(adapted(True), [[7, 8]])
    scale = one_by_one.abs().max()
    assert torch.allclose(one_by_one / scale, together / scale, atol=1e-5)
    assert torch.equal(together, recomputed)


def test_every_adapter_has_a_keyed_dropout() -> None:
    model = adapted(False)
    keyed = [m for m in model.modules() if isinstance(m, KeyedDropout)]
    assert len(keyed) == 2 * 7 and len({m.layer for m in keyed}) == 14
    assert not any(type(m) is nn.Dropout for m in model.modules())


@pytest.mark.parametrize("lengths", [[1], [3, 1249], [700]])
def test_compiled_loops_draw_the_same_masks(lengths: list[int]) -> None:
    tokens, result = sum(lengths), []
    for on in (True, False):
        assert not native.set_enabled(on=on), "this machine has no compiler"
        key = DropoutKey(7, 11, list(range(len(lengths))), lengths)
        result.append(KeyedDropout(0.05, "layer", key).keep_mask(torch.empty(1, tokens, 3)))
    assert torch.equal(*result)


@pytest.mark.parametrize(
    ("kind", "settings", "layers"),
    [
        ("llama", {}, set()),
        ("qwen2_moe", {}, set()),
        ("deepseek_v3", {}, set()),
        ("roberta", {"is_decoder": True}, {"lm_head.dense"}),
        ("prophetnet", {"num_decoder_layers": 1}, {"query_proj", "key_proj", "out_proj"}),
        ("zaya", {}, {"self_attn.qkv_proj.v_proj_delayed"}),
    ],
)
def test_layers_that_compute_other_rows_than_tokens_are_found(
    kind: str, settings: dict[str, Any], layers: set[str]
) -> None:
    config = AutoConfig.for_model(kind, **(settings or {"num_hidden_layers": 1}))
    uneven = uneven_layers(build_meta_model(config))
    head = {name for name in uneven if name.endswith(("lm_head", "lm_head.decoder"))}
    assert all(any(name.endswith(layer) for name in uneven) for layer in layers)
    assert head and bool(uneven - head) == bool(layers), "the head computes targets alone"
