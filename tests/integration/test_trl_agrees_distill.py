"""The divergences are those of TRL's GKDTrainer, in value and gradient."""

from __future__ import annotations

import warnings

import pytest
import torch

from dtrain.models.divergence import divergence_from, forward_kl, jensen_shannon, reverse_kl

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns that it is experimental
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

TOKENS, VOCABULARY = 9, 50


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(
    ("beta", "divergence"),
    [(0.0, forward_kl), (1.0, reverse_kl), (0.5, jensen_shannon(0.5)), (0.1, jensen_shannon(0.1))],
)
def test_divergence_is_trls(beta, divergence, temperature) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(1, TOKENS, VOCABULARY, generator=generator)
    student = torch.randn(1, TOKENS, VOCABULARY, generator=generator, requires_grad=True)
    expected = GKDTrainer.generalized_jsd_loss(
        student, teacher, beta=beta, temperature=temperature, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(expected, student)
    of_tokens = divergence_from(lambda tokens: teacher[0, tokens], divergence, temperature)
    losses, found = of_tokens(student.detach()[0], slice(0, TOKENS))
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, gradient[0], rtol=1e-4, atol=1e-6)
