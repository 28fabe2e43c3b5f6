"""Bottleneck adapters (arXiv:1902.00751): a small MLP with a residual after a linear layer.

Put on a model for training and for serving. PEFT has no such adapter; in a folder of PEFT's layout,
`peft_type` is BOTTLENECK, and a tensor's key is its name in the model.

Letters: T tokens, h outputs of the layer, m bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from dtrain.models.peft_format import WEIGHTS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """y + W_up activation(W_down y + b_down) + b_up, where y [..., T, h] is the layer's output.

    Args:
        base_layer: a linear layer; its weight may be on the meta device.
        size: m.
        activation: a key of `ACTIVATIONS`.
    """

    adapter_layer_names = ("adapter_down", "adapter_up")

    def __init__(self, base_layer: nn.Module, size: int, activation: str) -> None:
        super().__init__()
        self.base_layer, self.activation = base_layer, ACTIVATIONS[activation]
        self._disable_adapters = False
        width: Any = base_layer.nf if isinstance(base_layer, Conv1D) else base_layer.out_features
        device = base_layer.weight.device
        self.adapter_down = nn.Linear(width, size, device=device)
        self.adapter_up = nn.Linear(size, width, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, adapted unless `_disable_adapters`."""
        y: Tensor = self.base_layer(x)
        if self._disable_adapters:
            return y
        inner = self.activation(self.adapter_down(y.to(self.adapter_down.weight.dtype)))
        return y + self.adapter_up(inner).to(y.dtype)


def add_bottlenecks(model: nn.Module, layers: Sequence[str], size: int, activation: str) -> None:
    """Replace linear layers by adapted ones, whose adapters train; all other parameters do not.

    Args:
        layers: names in the model.
    """
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        layer = BottleneckLayer(model.get_submodule(name), size, activation)
        setattr(model.get_submodule(parent), leaf, layer)


def load_bottlenecks(model: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Put a saved adapter on its base.

    Args:
        config: content of the folder's adapter_config.json.

    Raises:
        ValueError, KeyError or AttributeError: it does not fit this base.
    """
    tensors = load_file(folder / WEIGHTS)
    layers = sorted({key.rpartition(".adapter_")[0] for key in tensors})
    add_bottlenecks(model, layers, config["bottleneck_size"], config["activation"])
    adapters = {n for n, _ in model.named_parameters() if ".adapter_" in n}
    if odd := sorted(adapters ^ tensors.keys()):
        raise ValueError(f"{odd[0]} has no counterpart")
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(tensor)
