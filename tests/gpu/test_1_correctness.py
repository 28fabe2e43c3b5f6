"""Part 1, six minutes at most: does it run, and is it right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dtrain.config import schema
from dtrain.models import by_document
from dtrain.models.attention import Documents, document_attention
from dtrain.models.dropout import DropoutKey, KeyedDropout
from dtrain.models.expert_nf4 import pack_experts
from dtrain.models.kernels import experts
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.load import freeze_for_training
from dtrain.models.loss import target_logits
from dtrain.models.packing_probe import ProbeSequence
from tests.micro_batches import fill_lora_b

LENGTHS = (1, 2, 77, 129, 500, 777)  # tokens of the documents of a row
STOP_AT_ONCE = {"DTRAIN_END_TIME": "1"}  # the end of the job is past: one step, a checkpoint
TINY_16 = ["model.dtype=bfloat16", "evaluation.generation={}"]
METHODS = {"lora": "{kind: lora, r: 8}", "qlora": "{kind: qlora, r: 8}", "full": "{kind: full}"}


def alone(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Each document by itself in float32: [1, H, T, D] and [1, K, T, D] twice → [1, T, H, D]."""
    outputs = []
    groups = query.shape[1] // key.shape[1]
    parts = (tensor.float().split(LENGTHS, dim=2) for tensor in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        n = q.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        if window is not None:
            seen &= seen.new_ones(n, n).triu(1 - window)
        outputs.append(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["all heads", "grouped heads"])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_attention_over_documents(device, dtype, size, heads, window, figures) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    query, key, value = (
        torch.randn(1, n, tokens, size, device=device, dtype=dtype, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    upstream = torch.randn(1, tokens, heads[0], size, device=device, dtype=dtype)
    output, _ = document_attention(nn.Identity(), query, key, value, Documents(LENGTHS, window))
    results = [output, *torch.autograd.grad(output, (query, key, value), upstream)]
    expected = alone(query, key, value, window)
    expected_results = [
        expected,
        *torch.autograd.grad(expected, (query, key, value), upstream.float()),
    ]
    errors = [
        float((a.detach().float() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(results, expected_results, strict=True)
    ]
    figures[f"attention error, head {size}, {heads[1]} key heads, window {window}"] = max(errors)
    assert max(errors) < (2e-2 if dtype == torch.bfloat16 else 1e-5), errors


@pytest.mark.parametrize("sizes", [(192, 128), (512, 512)], ids=["MLA", "Gemma 4"])
def test_attention_with_heads_that_flash_attention_does_not_take(device, dtype, sizes) -> None:
    torch.manual_seed(0)
    shapes = ((8, sizes[0]), (2, sizes[0]), (2, sizes[1]))
    query, key, value = (
        torch.randn(1, n, sum(LENGTHS), size, device=device, dtype=dtype, requires_grad=True)
        for n, size in shapes
    )
    output, _ = document_attention(nn.Identity(), query, key, value, Documents(LENGTHS, None))
    expected = alone(query, key, value, None)
    upstream = torch.randn_like(output)
    results = [output, *torch.autograd.grad(output, (query, key, value), upstream)]
    gradients = torch.autograd.grad(expected, (query, key, value), upstream.float())
    for result, wanted in zip(results, [expected, *gradients], strict=True):
        error = (result.float() - wanted).abs().max() / wanted.abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("window", [None, 64])
def test_sinks_take_probability(device, dtype, window) -> None:
    """Against the mask of scores, which float32 takes."""
    torch.manual_seed(0)
    shapes = ((1, 8, sum(LENGTHS), 64), (1, 2, sum(LENGTHS), 64), (1, 2, sum(LENGTHS), 64), (8,))
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    upstream, results = torch.randn(1, sum(LENGTHS), 8, 64, device=device), []
    for kind in (dtype, torch.float32):
        *qkv, sinks = leaves = [tensor.to(kind).requires_grad_() for tensor in inputs]
        documents = Documents(LENGTHS, window)
        output, _ = document_attention(nn.Identity(), *qkv, documents, s_aux=sinks)
        gradients = torch.autograd.grad(output, leaves, upstream.to(kind))
        results.append([output.float(), *(gradient.float() for gradient in gradients)])
    for result, wanted in zip(*results, strict=True):
        error = (result - wanted).abs().max() / wanted.abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


MIXTURE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = {
    "qwen3_moe": {"num_experts": 16, "moe_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("kind", MIXTURES)
def test_grouped_experts_equal_one_after_the_other(
    device, dtype, kind, rank, monkeypatch, figures
) -> None:
    """Nine tokens: most experts get none, and their gradients are zero, not what memory held."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MIXTURE, **MIXTURES[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=[], target_parameters=names))
    fill_lora_b(adapted, std=0.05)
    assert patch_modules(adapted)["experts"] == 2
    ids, results = torch.arange(3, 12, device=device)[None], []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(experts, "_has_grouped_kernel", lambda device: False)
        adapted.zero_grad()
        logits = adapted(input_ids=ids, use_cache=False).logits.float()
        logits.logsumexp(-1).sum().backward()
        gradients = [p.grad.float() for p in adapted.parameters() if p.grad is not None]
        results.append([logits.detach(), *gradients])
    worst = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for a, b in zip(*results, strict=True)
    )
    figures[f"experts of {kind}, rank {rank}: grouped against one by one"] = worst
    assert worst < (5e-2 if dtype == torch.bfloat16 else 1e-4)


def test_sorting_tokens_by_expert_does_not_wait(device) -> None:
    index = torch.randint(0, 16, (100, 2), device=device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        groups = experts.group_by_expert(index, 16)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert groups.ends[-1] == 200 and groups.ends.dtype == torch.int32


def test_experts_in_nf4_are_unpacked_as_each_by_itself(device, dtype) -> None:
    weights = (torch.randn(3, 128, 256) * 0.02).to(device, dtype)
    packed, states = pack_experts(weights, 2, dtype)
    for expert, weight in enumerate(weights):
        halves = [
            quantize_4bit(half.contiguous(), quant_type="nf4", compress_statistics=True)
            for half in weight.chunk(2)
        ]
        expected = torch.cat([dequantize_4bit(bits, state) for bits, state in halves])
        assert torch.equal(states.matrix(packed, expert), expected)


# A gated delta net, a short convolution, Mamba-2: with their packages' kernels where installed.
HYBRIDS = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "bamba": {
        "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 64,
        "mamba_n_groups": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("whole", [True, False], ids=["whole if possible", "document by document"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_with_a_state_separate_documents(
    device, dtype, kind, whole, figures, monkeypatch
) -> None:
    separates, probe = [], by_document._probe

    def probe_if_whole(*inputs: Any) -> bool:
        separates.append(whole and probe(*inputs))
        return separates[-1]

    monkeypatch.setattr(by_document, "_probe", probe_if_whole)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MIXTURE, **HYBRIDS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    freeze_for_training(model, schema.Model(base="here", gradient_checkpointing=True)).train()
    model.requires_grad_(True)
    documents = [torch.arange(3, 3 + n) for n in (1, 2, 77, 129)]
    results = []
    for rows in ([documents], [[document] for document in documents]):
        model.zero_grad()
        packed = [ProbeSequence.of(row) for row in rows]
        inputs = [
            ProbeSequence(
                row.input_ids.to(device), row.position_ids.to(device),
                row.target_positions.to(device), row.document_lengths,
            )
            for row in packed
        ]  # fmt: skip
        logits = []
        for row in inputs:
            logits.append(target_logits(model, row).float())
            logits[-1].logsumexp(-1).sum().backward()
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        results.append([torch.cat(logits).detach(), *gradients])
    worst = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for a, b in zip(*results, strict=True)
    )
    way = "whole" if any(separates) else "document by document"
    figures[f"{kind}: packed documents, {way}, against each by itself"] = worst
    assert worst < (1e-1 if dtype == torch.bfloat16 else 1e-3)


def small_llama(device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device=device, dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 2, 77, 2048])
def test_kernels_equal_plain_layers(device, dtype, tokens) -> None:
    plain, fast = small_llama(device, dtype), small_llama(device, dtype)
    assert patch_modules(fast)
    ids = torch.randint(0, 1024, (1, tokens), device=device)
    results = []
    for model in (plain, fast):
        logits = model(input_ids=ids).logits.float()
        logits.logsumexp(-1).sum().backward()
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        results.append([logits.detach(), *gradients])
    largest = max(float(tensor.abs().max()) for tensor in results[0])
    for a, b in zip(*results, strict=True):
        # A row of one token has no gradient of queries and keys but rounding.
        scale = max(float(a.abs().max()), 1e-3 * largest)
        assert float((a - b).abs().max()) / scale < (5e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("shape", [(128, 256), (1000, 384), (64, 4096)])
def test_nf4_codes_match_a_cpu(device, dtype, shape, figures) -> None:
    """A GPU divides approximately, so codes may differ: a merge packs where training did."""
    weight = (torch.randn(shape) * 0.02).to(dtype)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    there, state_there = quantize_4bit(
        weight.to(device), quant_type="nf4", compress_statistics=True
    )
    differ = float((packed != there.cpu()).float().mean())
    figures[f"NF4 bytes that differ from a CPU's, {shape}"] = differ
    assert differ < 1e-3 and (device.type == "cuda" or not differ)
    # The same bits unpack to the same values.
    state_there.absmax, state_there.offset = state.absmax.to(device), state.offset.to(device)
    again = dequantize_4bit(packed.to(device), state_there).cpu()
    assert torch.equal(dequantize_4bit(packed, state), again)


def test_dropout_masks_depend_only_on_the_sequence(device, dtype) -> None:
    key = DropoutKey(seed=1, step=2, sequences=[5, 9], lengths=[3, 4])
    layer = KeyedDropout(0.5, "a.layer", key).train()
    both = layer.keep_mask(torch.empty(1, 7, 64, device=device, dtype=dtype))
    key.sequences, key.lengths = [9], [4]
    assert torch.equal(
        both[:, 3:], layer.keep_mask(torch.empty(1, 4, 64, device=device, dtype=dtype))
    )
    assert 0.3 < float(both.float().mean()) < 0.7


@pytest.mark.whole_run
@pytest.mark.parametrize("launched", [False, True], ids=["by itself", "launcher"])
def test_two_stage_chain_runs(train, launched, figures) -> None:
    run = train("tiny", launched=launched)
    figures[f"tiny, {'by the launcher' if launched else 'by itself'}: seconds"] = run.seconds
    assert run.losses("task")[-1] < run.losses("task")[0]
    assert (run.folder / "task" / "merged" / "model.safetensors").exists()


@pytest.mark.whole_run
@pytest.mark.parametrize("method", METHODS)
def test_kernels_keep_the_losses_of_twenty_steps(train, method, figures) -> None:
    settings = [*TINY_16, f"stages.domain.method={METHODS[method]}"]
    settings += ["stages.domain.train.steps=20", "stages.task.train.steps=1"]
    plain = train("tiny", *settings, "model.kernels=off", folder="plain").losses("domain")
    fast = train("tiny", *settings, folder="auto").losses("domain")
    worst = max(abs(a - b) for a, b in zip(plain, fast, strict=True))
    figures[f"kernels against plain, {method}: largest difference of a loss"] = worst
    assert len(fast) == 20 and worst < 3e-2


@pytest.mark.whole_run
def test_engines_agree_on_one_rank(train, figures) -> None:
    engines = ("ddp", "fsdp2", "zero2", "zero3")
    losses = {
        engine: train("tiny", *TINY_16, f"engine.kind={engine}", folder=engine).losses("domain")
        for engine in engines
    }
    for engine in engines:
        worst = max(abs(a - b) for a, b in zip(losses[engine], losses["ddp"], strict=True))
        figures[f"{engine} against ddp: largest difference of a loss"] = worst
        assert worst < 3e-2, losses


@pytest.mark.whole_run
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_resumed_run_ends_with_the_same_weights(train, weights, engine) -> None:
    settings = [*TINY_16, f"engine.kind={engine}"]
    whole = train("tiny", *settings, folder="whole")
    train("tiny", *settings, env=STOP_AT_ONCE, expect=75)
    assert weights(train("tiny", *settings).folder) == weights(whole.folder)


@pytest.mark.whole_run
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_train(train, optimizer) -> None:
    # Matrices of 4096 elements: smaller ones keep a state of 32 bits.
    settings = [*TINY_16, "engine.kind=ddp", "stages.domain.method={kind: lora, r: 64}"]
    settings += ["stages.domain.train.learning_rate=1e-3"]
    exact = train("tiny", *settings, folder="exact").losses("domain")
    small = train("tiny", *settings, f"stages.domain.train.optimizer={optimizer}").losses("domain")
    assert small == pytest.approx(exact, abs=5e-2)


@pytest.mark.whole_run
def test_strict_runs_are_bitwise_reproducible(train, weights) -> None:
    settings = [*TINY_16, "engine.kind=ddp", "determinism=strict"]
    once, again = (train("tiny", *settings, folder=name).folder for name in ("once", "again"))
    assert weights(once) == weights(again)
