"""A document's results do not depend on other documents of its sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
from dtrain.models.kernels import varlen
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


@pytest.mark.parametrize("sizes", [(24, 16), (512, 512)], ids=["MLA", "large heads"])
def test_heads_that_flash_attention_does_not_take_as_they_are(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are padded for torch's flash attention; else each query head gets keys of its own."""
    size, value_size = sizes
    query, key = torch.randn(1, 4, 20, size), torch.randn(1, 2, 20, size)
    value, documents = torch.randn(1, 2, 20, value_size), attention.Documents((13, 7), None)
    monkeypatch.setattr(attention, "supports_causal_attention", lambda *_: False)
    expected, _ = attention.document_attention(nn.Identity(), query, key, value, documents)
    monkeypatch.setattr(varlen, "load_torch_varlen", lambda: varlen_as_documented)
    monkeypatch.setattr(varlen, "supports_varlen", lambda *_, **__: size <= 256)
    monkeypatch.setattr(attention, "_shares_heads", lambda *_: False)
    result, _ = attention.document_attention(nn.Identity(), query, key, value, documents)
    assert result.shape == (1, 20, 4, value_size)
    torch.testing.assert_close(result, expected)


def seen_scores(
    query: Tensor, key: Tensor, starts: Tensor, scale: float, window: tuple[int, int]
) -> Tensor:
    """Scores [H, T, T] of [T, H, D] and [T, K, D], -inf where a token does not look."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    position = torch.arange(len(query))
    document = torch.bucketize(position, starts[1:], right=True)
    ahead = position[None] - position[:, None]
    hidden = (ahead > window[1]) | (document[None] != document[:, None])
    if window[0] >= 0:
        hidden |= ahead < -window[0]
    return (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(hidden, -torch.inf)


def varlen_with_logsums(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *_: Any, scale: float,
    window_size: tuple[int, int], enable_gqa: bool, return_aux: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What torch says of its `varlen_attn` that returns logsumexp [H, T]; it has no gradient."""
    assert enable_gqa and return_aux.lse
    scores = seen_scores(query, key, starts, scale, window_size)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1)


def varlen_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsums: Tensor,
    starts: Tensor, _: Tensor, longest: int, __: int, is_causal: bool, random_state: Tensor,
    scale: float, window_size: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Flash attention's backward pass: probabilities from `logsums`, do . o from `out`."""
    assert is_causal == (window_size == [-1, 0])
    shared = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    p = (seen_scores(query, key, starts, scale, tuple(window_size)) - logsums[..., None]).exp()
    dp = torch.einsum("qhd,khd->hqk", gradient, values)
    ds = p * (dp - (gradient * out).sum(-1).t()[..., None]) * scale
    dk, dv = torch.einsum("hqk,qhd->khd", ds, query), torch.einsum("hqk,qhd->khd", p, gradient)
    dk, dv = (t.unflatten(1, (-1, shared)).sum(2) for t in (dk, dv))
    return torch.einsum("hqk,khd->qhd", ds, keys), dk, dv


@pytest.mark.parametrize("window", [None, 6])
def test_sinks_by_flash_attention_equal_a_mask_of_scores(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert varlen.load_varlen_backward() is not None
    shapes = ((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), (4,))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    documents, upstream = attention.Documents((13, 7), window), torch.randn(1, 20, 4, 8)
    results = []
    for on_flash in (False, True):
        monkeypatch.setattr(varlen, "supports_varlen", lambda *_, on=on_flash, **__: on)
        monkeypatch.setattr(varlen, "load_torch_varlen", lambda: varlen_with_logsums)
        monkeypatch.setattr(varlen, "load_varlen_backward", lambda: varlen_backward)
        *qkv, sinks = inputs
        output, _ = attention.document_attention(
            nn.Identity(), *qkv, documents, scaling=0.3, s_aux=sinks
        )
        results.append([output, *torch.autograd.grad(output, inputs, upstream)])
    for masked, flash in zip(*results, strict=True):
        torch.testing.assert_close(flash, masked, rtol=1e-4, atol=1e-5)


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

    assert varlen.load_torch_varlen() is not None
    monkeypatch.setattr(varlen, "load_torch_varlen", lambda: counted)
    monkeypatch.setattr(varlen, "supports_varlen", lambda *_, **__: True)
    torch.testing.assert_close(target_logits(model, row), expected)
    assert len(calls) == model.config.num_hidden_layers
