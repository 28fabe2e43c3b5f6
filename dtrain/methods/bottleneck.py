"""Bottleneck adapters after linear layers (arXiv:1902.00751)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import Bottleneck
from dtrain.config.methods.patterns import match_names
from dtrain.methods.adapter import AdapterMethod
from dtrain.models.bottleneck import add_bottlenecks
from dtrain.models.meta_model import linear_layers
from dtrain.models.peft_format import BOTTLENECK


class BottleneckMethod(AdapterMethod[Bottleneck]):
    """The base with adapted layers; the up-projections start at zero, so it computes the same."""

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name.endswith("adapter_down.weight"):
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)

    def barred_layers(self, model: PreTrainedModel) -> set[str]:
        return set()  # these adapters call the layer that they follow

    def adapt(self, model: PreTrainedModel, targets: str | list[str]) -> nn.Module:
        layers = match_names(linear_layers(model), targets)
        add_bottlenecks(model, layers, self.settings.bottleneck_size, self.settings.activation)
        return model

    def saved_config(self, model: nn.Module) -> dict[str, Any]:
        return {"peft_type": BOTTLENECK} | self.settings.model_dump(exclude={"kind", "quantize"})
