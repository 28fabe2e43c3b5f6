"""Methods that train vectors in linear layers: their recipe keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count, Text
from dtrain.config.methods.base import (
    LowRankSettings,
    MethodTraits,
    PeftSettings,
    QuantizableSettings,
    Shapes,
)

Names = Annotated[list[Text], Field(min_length=1)]


class Ia3(QuantizableSettings, PeftSettings):
    """Trained factors of keys, values and the MLP's inner activations (arXiv:2205.05638).

    The names of the layers are those of Llama and of the many models that follow it.
    """

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "ia3": MethodTraits(
            title="IA3",
            implementation="dtrain.methods.vectors:Ia3Method",
            adds_adapter=True,
            base_when_disabled=True,
        ),
    }
    kind: Literal["ia3"]
    target_modules: Names = Field(
        ["k_proj", "v_proj", "down_proj"],
        description="names of the linear layers that get factors",
    )
    feedforward_modules: list[Text] = Field(
        ["down_proj"],
        description="those of target_modules whose input is scaled; of others, the output",
    )

    def peft_config(self) -> dict[str, Any]:
        """The settings of PEFT's IA3Config."""
        return {"peft_type": "IA3", "feedforward_modules": list(self.feedforward_modules)}

    def decays(self, parameter: str) -> bool:
        return False  # a factor that decays turns the layer off

    def shapes(self, layer: str, outputs: int, inputs: int) -> Shapes:
        """One factor for each output, or for each input."""
        return ((self._factors(layer, outputs, inputs), 1),)

    def saved_elements(self, layer: str, outputs: int, inputs: int) -> int:
        """What is scaled."""
        return self._factors(layer, outputs, inputs)

    def _factors(self, layer: str, outputs: int, inputs: int) -> int:
        scales_input = any(layer.endswith(name) for name in self.feedforward_modules)  # as PEFT
        return inputs if scales_input else outputs


class Vera(QuantizableSettings, LowRankSettings):
    """Trained vectors between frozen random matrices that all layers share (arXiv:2310.11454)."""

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "vera": MethodTraits(
            title="VeRA",
            implementation="dtrain.methods.vectors:VeraMethod",
            adds_adapter=True,
            base_when_disabled=True,
        ),
    }
    kind: Literal["vera"]
    r: Count = Field(256, description="rank of the frozen matrices; larger than that of LoRA")
    projection_seed: Annotated[int, Field(ge=0)] = Field(
        0, description="decides the frozen matrices"
    )

    def peft_config(self) -> dict[str, Any]:
        """The settings of PEFT's VeraConfig."""
        return {
            "peft_type": "VERA",
            "r": self.r,
            "vera_dropout": self.dropout,
            "projection_prng_key": self.projection_seed,
            "save_projection": True,
        }

    @property
    def saves_inputs(self) -> bool:
        return False  # A, which it is multiplied with, is frozen

    def shapes(self, layer: str, outputs: int, inputs: int) -> Shapes:
        """The vectors b and d."""
        return (outputs, 1), (self.r, 1)

    def saved_elements(self, layer: str, outputs: int, inputs: int) -> int:
        """The products with A and with B."""
        return self.r + outputs

    def multiplied_elements(self, layer: str, outputs: int, inputs: int) -> int:
        """The parts of A and B that the layer uses."""
        return self.r * (inputs + outputs)
