"""IA3 (arXiv:2205.05638) and VeRA (arXiv:2310.11454): vectors train in each adapted layer."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ia3.layer import IA3Layer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import Ia3, Vera
from dtrain.methods.adapter import ADAPTER, AdapterMethod
from dtrain.models.vera import projections

INITIAL_D = 0.1  # PEFT's
PROJECTIONS = ("vera_A", "vera_B")  # of PEFT's model, shared by its layers


class Ia3Method(AdapterMethod[Ia3]):
    """A factor for each output, or each input, of a linear layer."""

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        nn.init.ones_(tensor)

    def changed_tensors(self, model: nn.Module) -> set[str]:
        assert isinstance(model, PeftModel)
        layers = [x for x in model.get_base_model().named_modules() if isinstance(x[1], IA3Layer)]
        with_bias = [n for n, m in layers if not m.is_feedforward and m.base_layer.bias is not None]
        return super().changed_tensors(model) | {f"{name}.bias" for name in with_bias}


class VeraMethod(AdapterMethod[Vera]):
    """Vectors b and d of each layer, around frozen matrices A and B that all layers share."""

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if "vera_lambda_d" in name:  # b stays zero
            nn.init.constant_(tensor, INITIAL_D)

    def attach(
        self, model: PreTrainedModel, *, seed: int, device: torch.device | None = None
    ) -> nn.Module:
        adapted = super().attach(model, seed=seed, device=device)
        for shared, drawn in zip(_shared(adapted), self._draw(adapted), strict=True):
            # In the compute dtype: of a wider one autocast would make, and keep, a copy a layer.
            shared[ADAPTER] = drawn.to(device or shared[ADAPTER].device, model.dtype)
        return adapted

    def _draw(self, adapted: nn.Module) -> tuple[Tensor, Tensor]:
        """A and B, float32 on the CPU; PEFT's may be on the meta device."""
        a, b = (shared[ADAPTER] for shared in _shared(adapted))
        return projections(self.settings.projection_seed, self.settings.r, a.shape[1], b.shape[0])

    def saved_tensors(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = (f"base_model.{name}" for name in PROJECTIONS)
        return super().saved_tensors(model, tensors) | dict(
            zip(names, self._draw(model), strict=True)
        )


def _shared(model: nn.Module) -> list[Any]:
    """What holds A and B in PEFT's VeraModel, by the adapter's name."""
    assert isinstance(model, PeftModel)
    return [getattr(model.base_model, name) for name in PROJECTIONS]
