"""LoRA and its relatives: their recipe keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.methods.base import LowRankSettings, MethodTraits, Shapes


class Lora(LowRankSettings):
    """Low-rank adapters (arXiv:2106.09685); qlora: over a base in NF4 (arXiv:2305.14314)."""

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "lora": MethodTraits(
            title="LoRA",
            implementation="dtrain.methods.lora:LoraMethod",
            adds_adapter=True,
            is_compared=True,
        ),
        "qlora": MethodTraits(
            title="QLoRA",
            implementation="dtrain.methods.lora:LoraMethod",
            quantizes_base=True,
            adds_adapter=True,
            is_compared=True,
        ),
    }
    kind: Literal["lora", "qlora"]
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="the adapter is scaled by alpha / r; default: 2 r",
    )

    @property
    def scale_alpha(self) -> float:
        """Alpha as used: the recipe's, or twice the rank."""
        return self.alpha if self.alpha is not None else 2.0 * self.r

    def peft_config(self) -> dict[str, Any]:
        """The settings of PEFT's LoraConfig."""
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.scale_alpha,
            "lora_dropout": self.dropout,
        }

    def shapes(self, layer: str, outputs: int, inputs: int) -> Shapes:
        """A and B."""
        return (self.r, inputs), (outputs, self.r)
