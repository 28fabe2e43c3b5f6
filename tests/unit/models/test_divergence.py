"""Divergences from a teacher: values and gradients of torch's KL, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM as Auto
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig

from dtrain.data.loader import MicroBatch
from dtrain.models.divergence import (
    DivergenceFn,
    distillation_losses,
    divergence_from,
    divergence_from_top_k,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    teacher_logits,
    teacher_top_k,
)
from dtrain.models.kernels import fused_cross_entropy
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.loss import target_logits
from tests.micro_batches import micro_batch

BETA, LENGTHS = 0.3, [5, 1, 12]
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
STUDENT = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, **SMALL)
TEACHERS: dict[str, PretrainedConfig] = {
    "wider": LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=64, **SMALL),
    "padded": LlamaConfig(vocab_size=80, hidden_size=48, intermediate_size=64, **SMALL),
    "shorter": LlamaConfig(vocab_size=60, hidden_size=48, intermediate_size=64, **SMALL),
    "capped": Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=16,
        final_logit_softcapping=2.0, **SMALL,
    ),
}  # fmt: skip
DIVERGENCES: dict[str, DivergenceFn] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": jensen_shannon(BETA),
}


def by_torch(kind: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """The divergence of each token [c] as torch computes it."""
    log_p, log_q = (log_softmax(x / temperature, 1) for x in (teacher, student))
    if kind == "forward":
        return kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    if kind == "reverse":
        return kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    middle = (BETA * log_p.exp() + (1 - BETA) * log_q.exp()).log()
    first, second = (
        kl_div(middle, x, reduction="none", log_target=True).sum(1) for x in (log_p, log_q)
    )
    return BETA * first + (1 - BETA) * second


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_values_and_gradients_are_those_of_torch(kind: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(7, 24, generator=generator, dtype=torch.float64)
    student = torch.randn(7, 24, generator=generator, dtype=torch.float64).requires_grad_()
    expected = by_torch(kind, teacher, student, temperature)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    divergence = divergence_from(lambda tokens: teacher[tokens], DIVERGENCES[kind], temperature)
    values, found = divergence(student.detach(), slice(0, 7))
    torch.testing.assert_close(values, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


def build(config: PretrainedConfig, *, fused: bool) -> nn.Module:
    torch.manual_seed(config.vocab_size)
    model = Auto.from_config(config, attn_implementation="eager")
    nn.init.normal_(model.get_output_embeddings().weight, std=0.3)  # far from uniform
    if fused:
        patch_modules(model)
    return model


def batch() -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    return micro_batch(torch.randint(0, 60, (sum(LENGTHS),), generator=generator), LENGTHS)


def assert_is_torchs(kind: str, student: nn.Module, teacher: nn.Module, rows: MicroBatch) -> None:
    """0.4 of the divergence at temperature 2 and 0.6 of the cross-entropy, against torch."""
    with torch.no_grad():
        others = target_logits(teacher, rows)
    logits, width = target_logits(student, rows), min(others.shape[1], STUDENT.vocab_size)
    divergences = by_torch(kind, others[:, :width], logits[:, :width], 2.0)
    entropies = cross_entropy(logits, rows.targets, reduction="none")
    losses = 0.4 * divergences + 0.6 * entropies
    parameters = list(student.parameters())
    expected = torch.autograd.grad(losses.sum(), parameters)

    divergence = divergence_from(teacher_logits(teacher, rows), DIVERGENCES[kind], 2.0)
    found = distillation_losses(student, rows, divergence, divergence_weight=0.4, ce_weight=0.6)
    torch.testing.assert_close(found.losses, losses.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.divergences, divergences.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.cross_entropies, entropies.detach(), rtol=1e-6, atol=1e-6)
    assert found.total.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    for gradient, right in zip(torch.autograd.grad(found.total, parameters), expected, strict=True):
        scale = right.abs().max()
        torch.testing.assert_close(gradient / scale, right / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("fused", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize(
    ("kind", "teacher"), [("forward", "padded"), ("reverse", "shorter"), ("jsd", "capped")]
)
def test_the_loss_of_two_models(kind: str, teacher: str, fused: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda vocabulary: 4)
    models = build(STUDENT, fused=fused), build(TEACHERS[teacher], fused=fused)
    assert_is_torchs(kind, *models, batch())


def test_models_with_and_without_kernels_may_meet() -> None:
    assert_is_torchs(
        "jsd", build(STUDENT, fused=True), build(TEACHERS["wider"], fused=False), batch()
    )


@pytest.mark.parametrize("fused", [True, False], ids=["chunked", "whole"])
def test_the_likeliest_tokens_are_scaled_to_one(fused: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda vocabulary: 4)
    student, teacher, rows = (
        build(STUDENT, fused=fused),
        build(TEACHERS["padded"], fused=fused),
        batch(),
    )
    others, logits = target_logits(teacher, rows)[:, :64], target_logits(student, rows)
    for k, temperature in ((5, 2.0), (1000, 1.0)):
        values, tokens = teacher_top_k(teacher, rows, k, STUDENT.vocab_size)
        kept = torch.full_like(others, -1e9).scatter(
            1, tokens.long(), others.gather(1, tokens.long())
        )
        expected = by_torch("forward", kept, logits, temperature)
        assert tokens.shape == (len(rows.targets), min(k, 64))
        divergence = divergence_from_top_k(values, tokens, temperature)
        found = distillation_losses(student, rows, divergence)
        torch.testing.assert_close(found.losses, expected.detach(), rtol=1e-6, atol=1e-6)
        matrix = student.get_output_embeddings().weight
        (gradient,) = torch.autograd.grad(found.total, matrix)
        (right,) = torch.autograd.grad(expected.sum(), matrix, retain_graph=True)
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda vocabulary: 4)
    student, rows = build(STUDENT, fused=True), batch()
    sizes = list[int]()
    of_teacher = teacher_logits(build(TEACHERS["wider"], fused=True), rows)

    def counted(tokens: slice) -> Tensor:
        logits = of_teacher(tokens)
        sizes.append(len(logits))
        return logits

    distillation_losses(student, rows, divergence_from(counted, forward_kl))
    assert sum(sizes) == len(rows.targets) and max(sizes) <= 5


@pytest.mark.parametrize("fused", [True, False])
def test_no_target_gives_a_zero_loss_with_a_graph(fused: bool) -> None:
    student, none = build(STUDENT, fused=fused), torch.zeros(0, dtype=torch.int64)
    token = torch.zeros(1, 2, dtype=torch.int64)
    rows = MicroBatch(token, torch.arange(2)[None], none, none, [2], [0], [2])
    divergence = divergence_from(teacher_logits(student, rows), forward_kl)
    found = distillation_losses(student, rows, divergence, ce_weight=0.5)
    found.total.backward()
    gradients = [p.grad for p in student.parameters()]
    assert found.total.item() == 0
    assert all(g is not None and not g.any() for g in gradients)
