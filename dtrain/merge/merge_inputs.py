"""What a merge adds to a base: one scaled adapter, or several combined as PEFT combines them.

An input also carries the 4-bit base that the adapter was trained on, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.weight_delta import BlockUpdate, LayerDelta

METHODS: dict[str, Callable[..., Tensor]] = {
    "linear": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
_torch_random = Lock()  # dare draws from torch's global generator


class WeightChange(Protocol):
    """A change of a base's tensors: an adapter, or several combined into one."""

    @property
    def names(self) -> set[str]:
        """Names of the tensors that change."""

    def block_update(self, name: str) -> BlockUpdate:
        """Return the function that changes blocks of rows of a tensor."""

    @property
    def unties(self) -> bool:
        """Whether it changes a tied embedding and output head differently."""

    def needs_all_rows(self, name: str) -> bool:
        """Return whether all rows of a tensor are needed at once."""


class QuantizedBase(Protocol):
    """The 4-bit form of a base that an adapter was trained on."""

    names: set[str]
    description: dict[str, Any]

    def dequantized(self, blocks: Iterator[Tensor], stored: torch.dtype) -> Iterator[Tensor]:
        """Yield blocks of rows as the 4-bit base computes with them."""


@dataclass(frozen=True)
class MergeInput:
    """One change of the base, and the form of the base that it was trained on.

    Attributes:
        description: plain values that identify the change, for the plan and the manifest.
    """

    change: WeightChange
    description: dict[str, Any]
    quantized_base: QuantizedBase | None = None

    @property
    def names(self) -> set[str]:
        """Names of the tensors that change."""
        return self.change.names | (self.quantized_base.names if self.quantized_base else set())

    def apply(self, name: str, stored: torch.dtype, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the new blocks of rows of a tensor, in float32.

        Args:
            stored: dtype of the tensor in the base's file.
        """
        if self.quantized_base and name in self.quantized_base.names:
            blocks = self.quantized_base.dequantized(blocks, stored)
        if name not in self.change.names:
            yield from blocks
            return
        update, row = self.change.block_update(name), 0
        if self.change.needs_all_rows(name):
            blocks = iter([torch.cat([block.clone() for block in blocks])])
        for block in blocks:
            yield update(block, row)
            row += len(block)


@dataclass(frozen=True)
class ScaledAdapter:
    """An adapter, multiplied by a weight.

    Raises:
        UserError: the weight is not 1, and the adapter replaces tensors instead of adding to them.
    """

    adapter: MergeableAdapter
    weight: float = 1.0

    def __post_init__(self) -> None:
        layers = self.adapter.layers
        not_sums = sorted(self.adapter.trained_whole)
        not_sums += [name for name in layers if {"m", "s"} & layers[name].keys.keys()]
        if self.weight != 1 and not_sums:
            message = f"{not_sums[0]} is not a sum of base and adapter, so it takes no weight"
            raise UserError(message, where=self.adapter.where)

    @property
    def names(self) -> set[str]:
        """Names of the tensors that change."""
        return self.adapter.names

    @property
    def unties(self) -> bool:
        """Whether it changes a tied embedding and output head differently."""
        return self.adapter.unties

    def block_update(self, name: str) -> BlockUpdate:
        """Return the function that changes blocks of rows of a tensor."""
        return self.adapter.block_update(name, self.weight)

    def needs_all_rows(self, name: str) -> bool:
        """Return whether all rows of a tensor are needed at once."""
        return self.adapter.needs_all_rows(name)


def adapter_input(
    adapter: MergeableAdapter, weight: float = 1.0, quantized_base: QuantizedBase | None = None
) -> MergeInput:
    """Return the merge input for one adapter."""
    description = {
        "adapter": adapter.tensors.fingerprint(),
        "weight": weight,
        "quantized_base": quantized_base.description if quantized_base else None,
    }
    return MergeInput(ScaledAdapter(adapter, weight), description, quantized_base)


@dataclass(frozen=True)
class CombineMethod:
    """How adapters are combined into one.

    Attributes:
        name: linear, ties, dare_linear or dare_ties.
        density: fraction of the elements that ties and dare keep.
        seed: for dare's choice; each layer draws from the seed and its own name alone.
    """

    name: str
    density: float = 0.5
    seed: int = 0


def combined_input(
    adapters: Sequence[MergeableAdapter],
    weights: Sequence[float],
    method: CombineMethod,
    quantized_base: QuantizedBase | None = None,
) -> MergeInput:
    """Return the merge input for several adapters combined into one."""
    description = {
        "combine": [method.name, method.density, method.seed],
        "weights": list(weights),
        "adapters": [adapter.tensors.fingerprint() for adapter in adapters],
        "quantized_base": quantized_base.description if quantized_base else None,
    }
    change = CombinedAdapters(adapters, weights, method)
    return MergeInput(change, description, quantized_base)


class CombinedAdapters:
    """Several adapters combined before they are added, by PEFT's own functions.

    As in PEFT's add_weighted_adapter, A and B are combined separately, each scaled by the square
    root of weight x scale.

    Args:
        weights: one for each adapter; their signs count.

    Raises:
        UserError: the adapters are not plain LoRA, or have different ranks on one layer.
    """

    def __init__(
        self,
        adapters: Sequence[MergeableAdapter],
        weights: Sequence[float],
        method: CombineMethod,
    ) -> None:
        self._adapters = list(zip(adapters, weights, strict=True))
        self._method = method
        self.names = {name for adapter in adapters for name in adapter.names}
        self.unties = any(adapter.unties for adapter in adapters)
        for name in sorted(self.names):
            self._check(name)

    def needs_all_rows(self, name: str) -> bool:
        """Return whether all rows of a tensor are needed at once."""
        return any(adapter.needs_all_rows(name) for adapter, _ in self._adapters)

    def block_update(self, name: str) -> BlockUpdate:
        """Return the function that changes blocks of rows of a tensor."""
        layers = [(a, w, a.layers[name]) for a, w in self._adapters if name in a.layers]
        roots = [math.sqrt(abs(w * layer.scale)) for _, w, layer in layers]
        signs = [-1.0 if w * layer.scale < 0 else 1.0 for _, w, layer in layers]
        factors = {"a": [r * s for r, s in zip(roots, signs, strict=True)], "b": roots}
        settings = {} if self._method.name == "linear" else {"density": self._method.density}
        combined: dict[str, Tensor] = {}
        with _torch_random, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(fingerprint([self._method.seed, name])[:15], 16))
            for role, weights in factors.items():
                tensors = [a.tensors.get(layer.keys[role]) for a, _, layer in layers]
                combine = METHODS[self._method.name]
                combined[role] = combine(tensors, torch.tensor(weights), **settings)
        layer = layers[0][2]
        result = LayerDelta({"a": "a", "b": "b"}, layer.r, 1.0, None, layer.transposed, layer.dims)
        return result.block_update(combined.__getitem__)

    def _check(self, name: str) -> None:
        layers = [adapter.layers.get(name) for adapter, _ in self._adapters]
        present = [layer for layer in layers if layer is not None]
        fix = "merge them one by one (without --combine), which is exact"
        if any(name in adapter.experts for adapter, _ in self._adapters):
            raise UserError(f"{name} holds experts; their adapters cannot be combined", fix=fix)
        if len(present) < len(layers) and any(
            name in adapter.trained_whole for adapter, _ in self._adapters
        ):
            raise UserError(
                f"{name} was trained whole; adapters like that cannot be combined", fix=fix
            )
        if any(set(layer.keys) != {"a", "b"} for layer in present):
            raise UserError(
                f"{name} is not plain LoRA; adapters like that cannot be combined", fix=fix
            )
        if len({layer.r for layer in present}) > 1:
            ranks = ", ".join(str(layer.r) for layer in present)
            message = f"{name} has ranks {ranks}; {self._method.name} needs equal ranks"
            raise UserError(message, fix=fix)
