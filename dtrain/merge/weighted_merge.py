"""Several adapters combined into one before it is added, by PEFT's own functions.

As PEFT's add_weighted_adapter: A and B are combined apart, each with the root of weight x scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint
from dtrain.merge.adapter import Adapter
from dtrain.merge.weight_delta import Layer, Step

METHODS: dict[str, Callable[..., Tensor]] = {
    "linear": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
_random = Lock()  # the functions draw from torch's only generator


class Combined:
    """Adapters that are merged as one.

    Args:
        how: linear, ties, dare_linear or dare_ties.
        weights: one an adapter; their signs count.
        density: share of the elements that ties and dare keep.
        seed: of dare's choice; each layer draws from the seed and its name alone.

    Raises:
        UserError: adapters that are not plain LoRA, or of different ranks on one layer.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        how: str,
        density: float,
        seed: int,
    ) -> None:
        self._parts = list(zip(adapters, weights, strict=True))
        self._how, self._density, self._seed = how, density, seed
        self.names = {name for adapter in adapters for name in adapter.names}
        self.unties = any(adapter.unties for adapter in adapters)
        for name in sorted(self.names):
            self._check(name)

    def needs_whole(self, name: str) -> bool:
        """Whether all rows of a base tensor are needed at once."""
        return any(adapter.needs_whole(name) for adapter, _ in self._parts)

    def step(self, name: str) -> Step:
        """What it does to blocks of rows of a base tensor, in float32."""
        parts = [(a, w, a.layers[name]) for a, w in self._parts if name in a.layers]
        roots = [math.sqrt(abs(w * layer.scale)) for _, w, layer in parts]
        signs = [-1.0 if w * layer.scale < 0 else 1.0 for _, w, layer in parts]
        factors = {"a": [r * s for r, s in zip(roots, signs, strict=True)], "b": roots}
        made: dict[str, Tensor] = {}
        with _random, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(fingerprint([self._seed, name])[:15], 16))
            for role, weights in factors.items():
                tensors = [a.tensors.get(layer.keys[role]) for a, _, layer in parts]
                made[role] = self._together(tensors, torch.tensor(weights))
        layer = parts[0][2]
        one = Layer({"a": "a", "b": "b"}, layer.r, 1.0, None, layer.turned, layer.dims)
        return one.step(made.__getitem__)

    def _together(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        settings: dict[str, Any] = {} if self._how == "linear" else {"density": self._density}
        return METHODS[self._how](tensors, weights, **settings)

    def _check(self, name: str) -> None:
        layers = [adapter.layers.get(name) for adapter, _ in self._parts]
        if any(layer is None for layer in layers) and any(
            name in adapter.trained_whole for adapter, _ in self._parts
        ):
            raise UserError(f"{name} was trained whole; such adapters are merged one by one")
        found = [layer for layer in layers if layer is not None]
        if any(set(layer.keys) != {"a", "b"} for layer in found):
            raise UserError(f"{name} is not plain LoRA; such adapters are merged one by one")
        if len({layer.r for layer in found}) > 1:
            ranks = ", ".join(str(layer.r) for layer in found)
            raise UserError(
                f"{name} has ranks {ranks}; {self._how} needs one",
                fix="merge them one by one (no --combine), which is exact",
            )
