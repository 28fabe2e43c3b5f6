"""Full fine-tuning: every parameter that text reaches trains, in float32."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from dtrain.config.methods import Full
from dtrain.core.log import say
from dtrain.methods.base import Method, summarize_names
from dtrain.models.meta_model import build_meta_model, unused_parameters


class FullFineTuning(Method[Full]):
    """The model itself, with every parameter trainable."""

    def attach(
        self, model: PreTrainedModel, *, seed: int, device: torch.device | None = None
    ) -> nn.Module:
        unused = unused_parameters(
            build_meta_model(model.config, trust_remote_code=model.is_custom_code())
        )
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(name not in unused)
        if unused:
            names = summarize_names(unused)
            say(f"{len(unused)} parameters stay frozen, as no text reaches them: {names}")
        model.train()
        return model

    def changed_tensors(self, model: nn.Module) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
