"""Dropout keyed by sequence, so that masks do not depend on ranks or micro-batches.

torch draws dropout masks from one generator a process. Here the mask of a layer's input is a
function of (seed, step, sequence, layer) alone: any number of ranks, any micro-batch size and any
recomputation drop the same elements.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.core.errors import UserError
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.models.kernels import native
from dtrain.models.meta_model import TOKENS, MetaValueDefaults, forward_meta, linear_layers

LANES = 4  # 16-bit numbers in a drawn int64: four elements per draw
LEVELS = 1 << 16


@dataclass
class DropoutKey:
    """The sequences of the next forward pass; all layers of a model share one key.

    Attributes:
        part: the tokens that a layer computes now, where it computes them in parts; else None.
    """

    seed: int = 0
    step: int = 0
    sequences: list[int] = field(default_factory=list)
    lengths: list[int] | None = None
    part: slice | None = None

    def number(self, sequence: int, layer: str) -> int:
        """63 bits that seed what a layer draws for a sequence."""
        name = f"{self.seed} {self.step} {sequence} {layer}"
        return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


class KeyedModule(nn.Module):
    """A module that draws random numbers by the model's key."""

    key: DropoutKey


class KeyedDropout(KeyedModule):
    """Dropout on [1, T, h], where T holds one sequence after the other.

    Args:
        p: probability of dropping an element, rounded to 1/65,536.
        layer: the layer's name, part of the mask's key.
        key: shared with the model's other layers.
    """

    def __init__(self, p: float, layer: str, key: DropoutKey) -> None:
        super().__init__()
        self.p, self.layer, self.key = p, layer, key
        self.threshold = min(round(p * LEVELS), LEVELS - 1)
        self.scale = LEVELS / (LEVELS - self.threshold)
        self._whole: Tensor | None = None  # mask of all tokens, from their first part to the last

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout in training mode; the identity in evaluation."""
        if not self.drops:
            return x
        result: Tensor = _Drop.apply(x, self.keep_mask(x), self.scale)
        return result

    @property
    def drops(self) -> bool:
        """Whether the next call drops anything.

        It does not in evaluation, nor for an empty micro-batch, whose two tokens count nowhere.
        """
        assert not self.training or self.key.lengths is not None, "call set_dropout_key first"
        return self.training and self.threshold > 0 and bool(self.key.lengths)

    def keep_mask(self, x: Tensor) -> Tensor:
        """The elements of x to keep, as bool.

        Args:
            x: [1, T, h]; or [T, h], as Qwen's shared experts, or [1, 1, T, h], as DeepSeek's keys.

        Raises:
            UserError: the layer computes other rows than the tokens; `uneven_layers` missed it.
        """
        key, part = self.key, self.key.part
        tokens = sum(key.lengths or ()) if part is None else part.stop - part.start
        first = _rows(x)
        if first != tokens:
            raise UserError(
                f"{self.layer} computes {first} rows for {tokens} tokens, so that it is unknown "
                "which of them a mask is for",
                where="method.dropout",
                fix="method.dropout=0",
            )
        width = x.numel() // tokens
        if part is None:
            return self._draw_all(width, x.device).view(x.shape)
        if part.start == 0:
            self._whole = self._draw_all(width, x.device)
        assert self._whole is not None
        kept = self._whole[part]
        if part.stop == len(self._whole):
            self._whole = None
        return kept.contiguous().view(x.shape)

    def _draw_all(self, width: int, device: torch.device) -> Tensor:
        """The mask [T, h] of all sequences."""
        key = self.key
        assert key.lengths
        kept = torch.empty(sum(key.lengths), width, dtype=torch.bool, device=device)
        for sequence, part in zip(key.sequences, kept.split(key.lengths), strict=True):
            self._draw(part, sequence)
        return kept

    def _draw(self, kept: Tensor, sequence: int) -> None:
        """Fill the mask [n, h] of one sequence."""
        number = self.key.number(sequence, self.layer)
        least = self.threshold - LEVELS // 2
        if kept.is_cpu and native.supports():  # draws the same numbers, faster
            native.call("keep", kept, kept.numel(), number & 0xFFFFFFFF, least)
            return
        generator = torch.Generator(kept.device).manual_seed(number)
        words = torch.empty(-(-kept.numel() // LANES), dtype=torch.int64, device=kept.device)
        words.random_(-(2**63), None, generator=generator)
        lanes = words.view(torch.int16)[: kept.numel()].view(kept.shape)
        torch.ge(lanes, least, out=kept)

    def extra_repr(self) -> str:
        """The arguments, for the model's representation."""
        return f"p={self.p}, layer={self.layer}"


class _Drop(torch.autograd.Function):
    """x * kept * scale; saves one byte per element for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (x * scale).mul_(kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * ctx.scale).mul_(kept), None, None


def key_dropouts(model: nn.Module, described: PreTrainedModel) -> list[str]:
    """Replace every dropout of an adapter with p > 0 by KeyedDropout.

    Args:
        described: the base, from `build_meta_model`.

    Returns:
        Layers whose adapters have no dropout, as no mask would fit their rows.
    """
    key, without, uneven = shared_key(model), list[str](), uneven_layers(described)
    modules = list(model.named_modules())
    layers: list[tuple[str, nn.Module]] = [x for x in modules if isinstance(x[1], BaseTunerLayer)]
    for name, layer in layers:
        for dropouts in layer.children():  # PEFT keeps them by the adapter's name
            for adapter, dropout in list(dropouts.named_children()):
                if not isinstance(dropouts, nn.ModuleDict) or not isinstance(dropout, nn.Dropout):
                    continue
                base_name = name.removeprefix(PEFT_PREFIX)
                if base_name in uneven:
                    dropouts[adapter] = nn.Identity()
                    without.append(base_name)
                else:
                    dropouts[adapter] = KeyedDropout(dropout.p, name, key)
    return without


def uneven_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that compute other rows than one for each token.

    ProphetNet computes several streams, Zaya a token by itself, and RoBERTa's head has a layer that
    sees the targets alone.

    Args:
        model: from `build_meta_model`.

    Returns:
        Those found until the forward pass needed values.
    """
    layers, uneven = linear_layers(model), set[nn.Module]()

    def record(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and _rows(args[0]) != TOKENS:
            uneven.add(layer)

    hooks = [layer.register_forward_pre_hook(record) for layer in layers.values()]
    with suppress(Exception), MetaValueDefaults(), torch.no_grad():
        forward_meta(model, targets=TOKENS // 2)
    for hook in hooks:
        hook.remove()
    return {name for name, layer in layers.items() if layer in uneven}


def _rows(x: Tensor) -> int:
    """The number of rows of [1, T, h], [T, h] or [1, 1, T, h]."""
    return next((size for size in x.shape[:-1] if size > 1), 1)


def shared_key(model: nn.Module) -> DropoutKey:
    """The key of the model's keyed modules; a new one if it has none."""
    return next((m.key for m in model.modules() if isinstance(m, KeyedModule)), DropoutKey())


def set_dropout_key(
    model: nn.Module, seed: int, step: int, sequences: list[int], lengths: list[int]
) -> None:
    """Set the key of the next forward pass; does nothing without keyed modules.

    Args:
        model: wrapped by an engine or not.
        sequences: numbers of the micro-batch's sequences, unique within the step.
        lengths: tokens of each of these sequences, in their order in the micro-batch.
    """
    key = shared_key(model)
    key.seed, key.step, key.sequences, key.lengths = seed, step, sequences, lengths
