"""How far a model's confidence in its next token is from how often that token is right.

Letters: K targets, c tokens of a chunk, V vocabulary, M bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.models.divergence import sum_of_chunks
from dtrain.models.loss import PackedTargets

BINS = 15


@torch.no_grad()
def calibration_gaps(model: nn.Module, micro_batch: PackedTargets) -> tuple[Tensor, Tensor]:
    """Compute the losses of the targets, and where the likeliest tokens are right.

    Args:
        model: wrapped by an engine or not.
        micro_batch: as for `target_losses`.

    Returns:
        Cross-entropy of each target, float32 [K]; and for each of M bins of equal width of the
        likeliest token's probability, ((m-1)/M, m/M], the sum over its targets of 1 if that token
        is the target less its probability, float64 [M].
    """
    targets = micro_batch.targets
    losses = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=targets.device)

    def measure(logits: Tensor, chunk: slice, needs_gradient: bool) -> Tensor:
        losses[chunk] = cross_entropy(logits, targets[chunk], reduction="none")
        confidence, likeliest = logits.softmax(1).max(1)
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        gaps.index_add_(0, bins, (likeliest == targets[chunk]).double() - confidence.double())
        return logits

    sum_of_chunks(model, micro_batch, losses, measure)
    return losses, gaps


def expected_calibration_error(gaps: Sequence[float], targets: float) -> float:
    """The expected calibration error (Guo et al., arXiv:1706.04599, equation 3).

    Args:
        gaps: sums of `calibration_gaps` over all targets [M].
        targets: their number.
    """
    return sum(abs(gap) for gap in gaps) / targets
