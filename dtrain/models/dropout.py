"""Dropout whose masks belong to sequences, not to processes.

Torch draws dropout from a generator of the process, so that the numbers depend on how many
ranks there are and on how rows fall into micro-batches. Here the mask of a layer's input is a
function of (seed, step, sequence, layer) alone: any number of ranks, any micro-batch and any
recomputation drop the same elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dtrain.models.kernels import native

LANES = 4  # 16-bit numbers in one drawn int64: a quarter of the draws
LEVELS = 1 << 16


@dataclass
class DropoutKey:
    """What the next forward pass works on; one object, shared by all layers of a model."""

    seed: int = 0
    step: int = 0
    sequences: list[int] = field(default_factory=list)
    lengths: list[int] | None = None


class KeyedDropout(nn.Module):
    """Dropout on [1, T, h] for rows of sequences laid end to end.

    Args:
        p: share of dropped elements (kept to 1/65,536).
        layer: the layer's name, part of the mask's key.
        key: shared with the model's other layers.
    """

    def __init__(self, p: float, layer: str, key: DropoutKey) -> None:
        super().__init__()
        self.p, self.layer, self.key = p, layer, key
        self.threshold = min(round(p * LEVELS), LEVELS - 1)
        self.scale = LEVELS / (LEVELS - self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Drop and rescale in training mode; the identity in evaluation."""
        if not self.drops:
            return x
        result: Tensor = _Drop.apply(x, self.kept(x), self.scale)
        return result

    @property
    def drops(self) -> bool:
        """Whether the next call drops anything: in training only.

        A micro-batch of no sequences is two tokens that count nowhere.
        """
        assert not self.training or self.key.lengths is not None, "set_dropout_key comes first"
        return self.training and self.threshold > 0 and bool(self.key.lengths)

    def kept(self, x: Tensor) -> Tensor:
        """Which elements of x [1, T, h] stay, as bool."""
        key, (rows, tokens, width) = self.key, x.shape
        assert rows == 1, "rows are laid end to end, not stacked"
        assert key.lengths and sum(key.lengths) == tokens, "the key is of another micro-batch"
        kept = torch.empty(1, tokens, width, dtype=torch.bool, device=x.device)
        parts = kept[0].split(key.lengths)
        for sequence, part in zip(key.sequences, parts, strict=True):
            self._draw(part, sequence)
        return kept

    def _draw(self, kept: Tensor, sequence: int) -> None:
        """Fill kept [n, h] for one sequence."""
        name = f"{self.key.seed} {self.key.step} {sequence} {self.layer}"
        number = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
        least = self.threshold - LEVELS // 2
        if kept.is_cpu and native.fits():  # the same numbers, drawn faster
            native.call("keep", kept, kept.numel(), number >> 1 & 0xFFFFFFFF, least)
            return
        generator = torch.Generator(kept.device).manual_seed(number >> 1)
        words = torch.empty(-(-kept.numel() // LANES), dtype=torch.int64, device=kept.device)
        words.random_(-(2**63), None, generator=generator)
        lanes = words.view(torch.int16)[: kept.numel()].view(kept.shape)
        torch.ge(lanes, least, out=kept)

    def extra_repr(self) -> str:
        """As torch's Dropout, plus the key."""
        return f"p={self.p}, layer={self.layer}"


class _Drop(torch.autograd.Function):
    """x * kept * scale, remembering one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (x * scale).mul_(kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * ctx.scale).mul_(kept), None, None


def key_dropouts(model: nn.Module) -> None:
    """Replace every LoRA dropout with p > 0 by a keyed one."""
    key = DropoutKey()
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        dropouts = module.lora_dropout
        for adapter, dropout in list(dropouts.items()):
            if isinstance(dropout, nn.Dropout) and dropout.p > 0:
                dropouts[adapter] = KeyedDropout(dropout.p, name, key)


def set_dropout_key(
    model: nn.Module, seed: int, step: int, sequences: list[int], lengths: list[int]
) -> None:
    """Say what the next forward passes work on; a model without keyed dropout is left alone.

    Args:
        model: wrapped by an engine or not.
        sequences: numbers of the micro-batch's sequences, unique in the step.
        lengths: their numbers of tokens; the row is these laid end to end.
    """
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            key = module.key
            key.seed, key.step, key.sequences, key.lengths = seed, step, sequences, lengths
            return
