"""Micro-batches of unit tests, and adapters that change something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.data.loader import MicroBatch


def micro_batch(
    ids: Tensor,
    lengths: list[int],
    sequences: Sequence[int] = (0,),
    sequence_lengths: list[int] | None = None,
    **more: Any,
) -> MicroBatch:
    """Documents of these lengths, of which all tokens but the first are targets.

    Args:
        ids: int64 [T].
        sequences, sequence_lengths: one sequence by default.
        more: other fields.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])
    targets = (positions > 0).nonzero()[:, 0]
    return MicroBatch(
        ids[None],
        positions[None],
        targets - 1,
        ids[targets],
        lengths,
        list(sequences),
        sequence_lengths or [len(ids)],
        **more,
    )


def fill_lora_b(model: nn.Module, std: float) -> None:
    """Give every B random values: while it is zero, an adapter changes nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
