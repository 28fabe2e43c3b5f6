"""A document's results do not depend on other documents of its sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DeepseekV32Config,
    Gemma2Config,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from dtrain.config import schema
from dtrain.models import attention
from dtrain.models.load import load_base
from dtrain.models.loss import target_logits, token_losses

LENGTHS = [5, 1, 17, 9]
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "llama-gqa": LlamaConfig(**SMALL),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=4),
    "qwen2-sliding": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "gemma2-softcap": Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    # It changes its mask: a token sees four of the tokens before it.
    "deepseek-sparse": DeepseekV32Config(
        **SMALL | {"num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        v_head_dim=8, qk_nope_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16, index_n_heads=16, index_head_dim=16,
        index_topk=4,
    ),
}  # fmt: skip


@dataclass
class Row:
    input_ids: Tensor
    position_ids: Tensor | None
    target_positions: Tensor
    targets: Tensor
    document_lengths: list[int]


def pack(documents: list[Tensor]) -> Row:
    """All tokens but each document's first are targets."""
    ids = torch.cat(documents)
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    targets = (positions > 0).nonzero()[:, 0]
    lengths = [len(d) for d in documents]
    return Row(ids[None], positions[None], targets - 1, ids[targets], lengths)


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (n,), generator=generator) for n in LENGTHS]


def saved(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    Auto.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path, **settings: object) -> PreTrainedModel:
    chosen = schema.Model(base=str(folder), **settings)  # type: ignore[arg-type]
    return load_base(
        folder, chosen, quantized=False, dtype=torch.float32, device=torch.device("cpu")
    )


def document_losses(logits: Tensor, row: Row) -> list[Tensor]:
    """The loss of each document of a row."""
    counts = [n - 1 for n in row.document_lengths]
    pairs = zip(logits.split(counts), row.targets.split(counts), strict=True)
    return [token_losses(x, targets).sum() for x, targets in pairs]


def losses_and_gradient(model: PreTrainedModel, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    model.zero_grad()
    logits = [target_logits(model, row) for row in rows]
    losses = torch.stack(
        [loss for x, r in zip(logits, rows, strict=True) for loss in document_losses(x, r)]
    )
    losses.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.cat(logits).detach(), losses.detach(), gradient


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_documents_alone(
    name: str, checkpointing: bool, tmp_path: Path
) -> None:
    model = load(saved(CONFIGS[name], tmp_path), gradient_checkpointing=checkpointing)
    model.requires_grad_(True).train()
    logits, losses, gradient = losses_and_gradient(model, [pack(documents())])
    alone = losses_and_gradient(model, [pack([d]) for d in documents()])
    assert torch.allclose(logits, alone[0], atol=1e-5)
    assert torch.allclose(losses, alone[1], atol=1e-5)
    assert torch.allclose(gradient, alone[2], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_document_without_position_ids_equals_a_packed_one(name: str, tmp_path: Path) -> None:
    """As models are trained that take one document a forward pass."""
    model = load(saved(CONFIGS[name], tmp_path)).requires_grad_(True).train()
    packed = losses_and_gradient(model, [pack(documents())])
    rows = [replace(pack([document]), position_ids=None) for document in documents()]
    for first, second in zip(packed, losses_and_gradient(model, rows), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_eager_attention_with_a_full_mask(name: str, tmp_path: Path) -> None:
    folder = saved(CONFIGS[name], tmp_path)
    results = []
    for kind in ("auto", "eager"):
        model = load(folder, attention=kind)
        model.requires_grad_(True).train()
        results.append(losses_and_gradient(model, [pack(documents())]))
    for ours, eager in zip(*results, strict=True):
        assert torch.allclose(ours, eager, atol=1e-5)


def test_llama_uses_documents_and_equals_sdpa(tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama-gqa"], tmp_path)
    model, sdpa = load(folder), load(folder, attention="sdpa")
    assert model.config._attn_implementation == "documents"
    row = pack(documents())
    assert torch.allclose(target_logits(model, row), target_logits(sdpa, row), atol=1e-5)


@pytest.mark.parametrize("kept", [0, 1])
def test_models_may_slice_queries_out_of_the_mask(kept: int, tmp_path: Path) -> None:
    """Gemma 4 does where its last layers share keys, unless logits are asked for by place."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma4TextConfig(
        **SMALL | {"num_hidden_layers": 4}, head_dim=8, global_head_dim=8, sliding_window=4,
        layer_types=kinds, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
    )  # fmt: skip
    folder, row = saved(config, tmp_path), pack(documents())
    model, sdpa = load(folder), load(folder, attention="sdpa")
    assert model.config._attn_implementation == "documents"
    arguments = {"position_ids": row.position_ids, "use_cache": False, "logits_to_keep": kept}
    ours, expected = (m(input_ids=row.input_ids, **arguments).logits for m in (model, sdpa))
    assert torch.allclose(ours, expected, atol=1e-5)


def test_softcap_falls_back_to_eager(tmp_path: Path) -> None:
    model = load(saved(CONFIGS["gemma2-softcap"], tmp_path))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-sliding"])
def test_generation_with_padding_and_cache_is_unchanged(name: str, tmp_path: Path) -> None:
    folder = saved(CONFIGS[name], tmp_path)
    ids = torch.stack([documents()[2], documents()[2].flip(0)])
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    texts = [
        load(folder, attention=attention).generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cache,
            pad_token_id=0,
        )
        for attention in ("auto", "sdpa")
        for cache in (True, False)
    ]  # fmt: skip
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_no_target_token_gives_zero_loss_with_a_graph(tmp_path: Path) -> None:
    model = load(saved(CONFIGS["llama"], tmp_path)).requires_grad_(True)
    logits = target_logits(model, pack([documents()[1]]))
    assert logits.shape == (0, 64)
    loss = token_losses(logits, torch.zeros(0, dtype=torch.int64)).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_loss_of_half_precision_logits_is_computed_in_float32() -> None:
    logits = torch.randn(300, 64, dtype=torch.bfloat16)
    targets = torch.randint(0, 64, (300,))
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    assert token_losses(logits, targets).dtype == torch.float32
    assert token_losses(logits, targets).sum().item() == pytest.approx(exact.item(), rel=1e-6)


def varlen_as_documented(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor,
    longest: int, longest_key: int, *, scale: float, window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch says of its `varlen_attn`, which computes on GPUs only: [T, H, D] in and out."""
    assert starts.dtype == torch.int32 and starts.equal(key_starts)
    lengths = starts.diff().tolist()
    assert longest == longest_key == max(lengths)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    before, after = window_size
    outputs = []
    for q, k, v in zip(*(t.split(lengths) for t in (query, key, value)), strict=True):
        positions = torch.arange(len(q))
        ahead = positions[None] - positions[:, None]
        seen = ahead <= after if after >= 0 else ahead > -len(q)
        seen &= ahead >= -before if before >= 0 else ahead < len(q)
        heads = [t.transpose(0, 1) for t in (q, k, v)]
        result = scaled_dot_product_attention(*heads, seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(result.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "mistral-sliding"])
def test_varlen_attention_equals_one_call_per_document(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, row = load(saved(CONFIGS[name], tmp_path)), pack(documents())
    expected = target_logits(model, row)
    calls = []

    def counted(*args: Any, **named: Any) -> Tensor:
        calls.append(args)
        return varlen_as_documented(*args, **named)

    assert attention.load_torch_varlen() is not None
    monkeypatch.setattr(attention, "load_torch_varlen", lambda: counted)
    monkeypatch.setattr(attention, "supports_varlen", lambda query, value: True)
    torch.testing.assert_close(target_logits(model, row), expected)
    assert len(calls) == model.config.num_hidden_layers
