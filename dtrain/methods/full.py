"""Full fine-tuning: every parameter that text reaches trains, or some of them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from dtrain.config.methods import Full
from dtrain.config.methods.patterns import check_parameter_patterns
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.methods.base import Method, summarize_names
from dtrain.methods.saved_modules import trained_routers
from dtrain.models.decoder_layers import decoder_layers
from dtrain.models.expert_layers import routers
from dtrain.models.meta_model import build_meta_model, unused_parameters


class FullFineTuning(Method[Full]):
    """The model itself; what trains is in float32."""

    def base_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.settings.trains_all else compute_dtype

    def attach(
        self, model: PreTrainedModel, *, seed: int, device: torch.device | None = None
    ) -> nn.Module:
        unused = unused_parameters(
            build_meta_model(model.config, trust_remote_code=model.is_custom_code())
        )
        chosen = self._chosen(model) - unused - self._frozen_routers(model, unused)
        for name, parameter in model.named_parameters():
            trains = name in chosen
            if trains and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(trains)
        if unused:
            names = summarize_names(unused)
            say(f"{len(unused)} parameters stay frozen, as no text reaches them: {names}")
        if not self.settings.trains_all:
            model.disable_input_require_grads()  # backward ends at the lowest layer that trains
        model.train()
        return model

    def _chosen(self, model: PreTrainedModel) -> set[str]:
        """Names of the parameters that the settings let train."""
        settings, where = self.settings, "method.frozen_modules"
        layers = self._trainable_layers(model)
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        names = [n for n, p in model.named_parameters() if p in inside]
        check_parameter_patterns(settings.frozen_modules, names, where)
        chosen = {name for name in names if not settings.freezes(name)}
        if not chosen:
            raise UserError("every parameter is frozen", where=where, fix="name fewer of them")
        return chosen

    def _frozen_routers(self, model: PreTrainedModel, unused: set[str]) -> set[str]:
        """Names of the parameters of routers, unless these train."""
        trained = trained_routers(model, self.settings, unused)
        for name, _ in model.named_parameters():
            if name.startswith(tuple(f"{router}." for router in trained)):
                self._check_trains(name)
        frozen = routers(model) - trained
        if frozen:
            say(f"the routers of {len(frozen)} layers stay frozen")
        inside = tuple(f"{name}." for name in frozen)
        return {name for name, _ in model.named_parameters() if name.startswith(inside)}

    def _check_trains(self, router: str) -> None:
        """Check that a parameter of a router that trains is not frozen by name."""
        if self.settings.freezes(router):
            raise UserError(
                f"{router} belongs to a router, which would train and stay frozen",
                where="method.frozen_modules and method.router",
                fix="remove it from frozen_modules, or router=frozen",
            )

    def _trainable_layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder layers whose parameters may train, or the whole model."""
        count, layers = self.settings.trainable_layers, decoder_layers(model)
        if count is None:
            return [model]
        if count > len(layers):
            raise UserError(
                f"the model has {len(layers)} decoder layers, not {count}",
                where="method.trainable_layers",
                fix=f"at most {len(layers)}",
            )
        return layers[-count:]

    def changed_tensors(self, model: nn.Module) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
