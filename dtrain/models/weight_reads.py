"""Finds the linear layers whose weight a model's code reads without calling them."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from dtrain.models.meta_model import MetaValueDefaults, forward_meta, linear_layers

CONTAINERS = nn.ModuleList | nn.ModuleDict | nn.Sequential


def layers_read_outside_forward(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers whose weight other code of the model reads or changes.

    That code would take the bits of a packed weight for numbers, and pass over an adapter: Gemma 3n
    clamps one, RWKV divides some in evaluation mode. Layers that share their weight, such as an
    output matrix with the embeddings, are not among them.

    Args:
        model: from `build_meta_model`.

    Returns:
        Those found until the forward pass needed values, in training and in evaluation mode, and
        their like in other modules of the same class.
    """
    layers = linear_layers(model)
    uses = Counter(p for module in model.modules() for p in module._parameters.values())
    weights = {layer.get_parameter("weight"): layer for layer in layers.values()}
    reads = WeightReadRecorder({w: layer for w, layer in weights.items() if uses[w] == 1})
    hooks = [
        hook
        for layer in layers.values()
        for hook in (
            layer.register_forward_pre_hook(lambda module, _: reads.running.add(module)),
            layer.register_forward_hook(lambda module, *_: reads.running.discard(module)),
        )
    ]
    for training in (False, True):
        model.train(training)
        reads.running.clear()
        with (
            suppress(Exception),
            reads,
            MetaValueDefaults(),
            torch.no_grad(),
        ):
            forward_meta(model)
    for hook in hooks:
        hook.remove()
    read = {_role(model, name) for name, layer in layers.items() if layer in reads.read}
    return {name for name in layers if _role(model, name) in read}


def _role(model: nn.Module, name: str) -> tuple[type[nn.Module], tuple[str, ...]]:
    """The class of the module that holds a layer, and the layer's name there without numbers."""
    parts = name.split(".")
    depth = len(parts) - 1
    while isinstance(parent := model.get_submodule(".".join(parts[:depth])), CONTAINERS):
        depth -= 1
    return type(parent), tuple(part for part in parts[depth:] if not part.isdigit())


class WeightReadRecorder(TorchFunctionMode):
    """Records the weights that are used outside their own layer's forward.

    Attributes:
        running: layers whose forward is running.
        read: layers whose weight was used while their forward was not running.
    """

    def __init__(self, owners: dict[Tensor, nn.Module]) -> None:
        super().__init__()
        self._owners = owners
        self.running: set[nn.Module] = set()
        self.read: set[nn.Module] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = None
        try:
            result = func(*args, **(kwargs or {}))
        finally:  # also of a function that needs values; a shape or a dtype is the same when packed
            if result is None or any(isinstance(x, Tensor) for x in tree_leaves(result)):
                given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter))
                owners = {self._owners.get(x) for x in given} - self.running
                self.read |= {owner for owner in owners if owner is not None}
        return result
