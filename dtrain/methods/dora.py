"""DoRA (arXiv:2402.09353), and QDoRA over a base in NF4."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.methods.adapter import ADAPTER
from dtrain.methods.lora import LoraMethod
from dtrain.models.dora import add_magnitude, base_matrix, magnitude_of


class DoraMethod(LoraMethod):
    """LoRA, with the length of each row of the changed weight as a parameter of its own."""

    def _with_adapter(
        self, model: PreTrainedModel, targets: str | list[str], **more: Any
    ) -> PeftModel:
        # With use_dora PEFT would measure the base's weights now, before they are loaded.
        adapted = super()._with_adapter(model, targets, **more, use_dora=False)
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                add_magnitude(module, ADAPTER)
        adapted.peft_config[ADAPTER].use_dora = True  # type: ignore[attr-defined]
        return adapted

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if "lora_magnitude_vector" not in name:  # measured in `on_weights_loaded`
            super().initialize(name, tensor, generator)

    def on_weights_loaded(self, block: nn.Module) -> None:
        super().on_weights_loaded(block)
        for name, module in block.named_modules():
            if isinstance(module, LoraLayer):
                magnitude = magnitude_of(module, ADAPTER)
                # A second call would overwrite what a checkpoint restored.
                if magnitude is not None and magnitude.base_squares is None:
                    magnitude.measure(base_matrix(module.get_base_layer()), name)
