"""LoRA (arXiv:2106.09685), and QLoRA (arXiv:2305.14314) over a base in NF4."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import Lora
from dtrain.config.methods.patterns import by_names
from dtrain.methods.adapter import ADAPTER, AdapterMethod
from dtrain.methods.new_tokens import rows_to_train

PATTERNS = ("rank_pattern", "alpha_pattern")


class LoraMethod(AdapterMethod[Lora]):
    """Two matrices of rank r added to each adapted linear layer."""

    def _with_adapter(
        self, model: PreTrainedModel, targets: str | list[str], **more: Any
    ) -> PeftModel:
        names = [*(name for name, _ in model.named_modules()), *self.experts]
        patterns = {key: getattr(self.settings, key) for key in PATTERNS}
        more |= {key: by_names(values, names) for key, values in patterns.items()}
        if self.new_tokens:
            whole = self.settings.whole_modules
            rows = rows_to_train(model, self.new_tokens, whole, targets)
            more |= {"trainable_token_indices": rows}
        if self.experts:  # PEFT has no dropout for them
            more |= {"target_parameters": self.experts, "lora_dropout": 0.0}
        adapted = super()._with_adapter(model, targets, **more)
        if self.experts and self.settings.dropout:
            _add_dropout(adapted, self.settings.dropout)
        for key, values in patterns.items():
            setattr(adapted.peft_config[ADAPTER], key, dict(values))
        return adapted

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        assert tensor.dim() == 2 and ("lora_A" in name or "lora_B" in name), name
        if "lora_A" in name:  # as in PEFT; B stays zero
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _add_dropout(adapted: PeftModel, probability: float) -> None:
    """Add dropout to the adapters of linear layers."""
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            module.lora_dropout[ADAPTER] = nn.Dropout(probability)
