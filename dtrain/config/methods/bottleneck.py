"""Bottleneck adapters: their recipe keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count, Text
from dtrain.config.methods.base import (
    AdapterSettings,
    MethodTraits,
    QuantizableSettings,
    Shapes,
)


class Bottleneck(QuantizableSettings, AdapterSettings):
    """Small MLPs after the layers that write to the residual stream (arXiv:1902.00751).

    The names of the layers are those of Llama and of the many models that follow it.
    """

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "bottleneck": MethodTraits(
            title="bottleneck adapters",
            implementation="dtrain.methods.bottleneck:BottleneckMethod",
            adds_adapter=True,
            base_when_disabled=True,
            cannot_merge="its activation makes it more than a change of weights",
        ),
    }
    kind: Literal["bottleneck"]
    target_modules: Annotated[list[Text], Field(min_length=1)] = Field(
        ["o_proj", "down_proj"],
        description="names of the linear layers that an adapter follows: after attention and MLP "
        "(Houlsby), or [down_proj], after the MLP alone (Pfeiffer, arXiv:2005.00247)",
    )
    bottleneck_size: Count = Field(64, description="width of the MLP")
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="of the MLP")

    def shapes(self, layer: str, outputs: int, inputs: int) -> Shapes:
        """Two matrices, each with its bias."""
        m = self.bottleneck_size
        return (m, outputs), (m, 1), (outputs, m), (outputs, 1)

    def saved_elements(self, layer: str, outputs: int, inputs: int) -> int:
        """The layer's output, and the MLP's inner activations before and after the function."""
        return outputs + 2 * self.bottleneck_size
