"""Full fine-tuning: every parameter that text reaches trains, or those of the last layers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from dtrain.config.methods import Full
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.methods.base import Method, summarize_names
from dtrain.models.decoder_layers import decoder_layers
from dtrain.models.meta_model import build_meta_model, unused_parameters


class FullFineTuning(Method[Full]):
    """The model itself; what trains is in float32."""

    def base_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        return compute_dtype if self.settings.trainable_layers else torch.float32

    def attach(
        self, model: PreTrainedModel, *, seed: int, device: torch.device | None = None
    ) -> nn.Module:
        unused = unused_parameters(
            build_meta_model(model.config, trust_remote_code=model.is_custom_code())
        )
        chosen = self._chosen(model)
        for name, parameter in model.named_parameters():
            trains = parameter in chosen and name not in unused
            if trains and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(trains)
        if unused:
            names = summarize_names(unused)
            say(f"{len(unused)} parameters stay frozen, as no text reaches them: {names}")
        if self.settings.trainable_layers:
            model.disable_input_require_grads()  # backward ends at the lowest layer that trains
        model.train()
        return model

    def _chosen(self, model: PreTrainedModel) -> set[nn.Parameter]:
        """The parameters that the settings let train."""
        count, layers = self.settings.trainable_layers, decoder_layers(model)
        if count is None:
            return set(model.parameters())
        if count > len(layers):
            raise UserError(
                f"the model has {len(layers)} decoder layers, not {count}",
                where="method.trainable_layers",
                fix=f"at most {len(layers)}",
            )
        return {parameter for layer in layers[-count:] for parameter in layer.parameters()}

    def changed_tensors(self, model: nn.Module) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
