"""Part 1, six minutes at most: does it run, and is it right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.models.attention import Documents, document_attention
from dtrain.models.dropout import DropoutKey, KeyedDropout
from dtrain.models.kernels.patch import patch_modules

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


def weights(folder: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(folder.glob("*/[am]*/*.safetensors")):
        hasher.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return hasher.hexdigest()


@pytest.mark.whole_run
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_resumed_run_ends_with_the_same_weights(train, engine) -> None:
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
def test_strict_runs_are_bitwise_reproducible(train) -> None:
    settings = [*TINY_16, "engine.kind=ddp", "determinism=strict"]
    once, again = (train("tiny", *settings, folder=name).folder for name in ("once", "again"))
    assert weights(once) == weights(again)
