"""AdaLoRA (arXiv:2303.10512): what is attached. The ranks are cut in the stage's objective."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import AdaLora
from dtrain.methods.adapter import ADAPTER, AdapterMethod

STD = 0.02  # PEFT's, of P and Q


class AdaLoraMethod(AdapterMethod[AdaLora]):
    """P (lora_B), Λ (lora_E) and Q (lora_A) of each adapted linear layer."""

    def _with_adapter(
        self, model: PreTrainedModel, targets: str | list[str], **more: Any
    ) -> PeftModel:
        adapted = super()._with_adapter(model, targets, **more)
        for module in adapted.modules():
            if isinstance(module, AdaLoraLayer):
                # A frozen parameter that is in no file: a constant needs no engine to hold it.
                del module.ranknum
                module.ranknum = {ADAPTER: float(self.settings.r)}  # type: ignore[assignment]
        return adapted

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if "lora_E" not in name:  # Λ stays zero
            nn.init.normal_(tensor, std=STD, generator=generator)
