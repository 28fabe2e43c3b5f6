"""VeRA's frozen random matrices, and the adapter as the LoRA that it equals (arXiv:2310.11454).

A layer's change is diag(b) B diag(d) A, where all layers share A and B. Letters: r rank, in and out
the largest sizes of the adapted layers; a layer uses the first columns of A and rows of B.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def projections(seed: int, r: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], float32 on the CPU, as PEFT draws them from the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return _kaiming_uniform((r, inputs), generator), _kaiming_uniform((outputs, r), generator)


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
