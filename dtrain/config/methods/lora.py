"""LoRA and its relatives: their recipe keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count, Text
from dtrain.config.methods.base import LowRankSettings, MethodTraits, Shapes
from dtrain.config.methods.patterns import check_patterns, value_for

RSLORA_ALPHA = 8.0  # at rank 16 the scale of LoRA's default


class Lora(LowRankSettings):
    """Low-rank adapters (arXiv:2106.09685) and their variants."""

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "lora": MethodTraits(
            title="LoRA",
            implementation="dtrain.methods.lora:LoraMethod",
            adds_adapter=True,
            stacks=True,
            has_kernel=True,
            adds_product=True,
            is_compared=True,
            base_when_disabled=True,
        ),
        "qlora": MethodTraits(
            title="QLoRA",
            implementation="dtrain.methods.lora:LoraMethod",
            quantizes_base=True,
            adds_adapter=True,
            stacks=True,
            has_kernel=True,
            adds_product=True,
            is_compared=True,
            base_when_disabled=True,
        ),
        "rslora": MethodTraits(
            title="rsLoRA",
            implementation="dtrain.methods.lora:LoraMethod",
            adds_adapter=True,
            stacks=True,
            has_kernel=True,
            base_when_disabled=True,
            adds_product=True,
        ),
        "dora": MethodTraits(
            title="DoRA",
            implementation="dtrain.methods.dora:DoraMethod",
            adds_adapter=True,
            has_kernel=True,
            base_when_disabled=True,
            quantized_kind="qdora",
        ),
        "qdora": MethodTraits(
            title="QDoRA",
            implementation="dtrain.methods.dora:DoraMethod",
            adds_adapter=True,
            has_kernel=True,
            base_when_disabled=True,
            quantizes_base=True,
        ),
        "pissa": MethodTraits(
            title="PiSSA",
            implementation="dtrain.methods.initialized:InitializedLora",
            adds_adapter=True,
            stacks=True,
            has_kernel=True,
            base_when_disabled=True,
            counts_from_start=True,
        ),
        "olora": MethodTraits(
            title="OLoRA",
            implementation="dtrain.methods.initialized:InitializedLora",
            adds_adapter=True,
            stacks=True,
            has_kernel=True,
            base_when_disabled=True,
            counts_from_start=True,
        ),
        "loftq": MethodTraits(
            title="QLoRA, LoftQ's start",
            implementation="dtrain.methods.initialized:InitializedLora",
            adds_adapter=True,
            stacks=True,
            has_kernel=True,
            quantizes_base=True,
        ),
    }
    kind: Literal["lora", "qlora", "rslora", "dora", "qdora", "pissa", "olora", "loftq"] = Field(
        description="qlora: over a base in NF4 (arXiv:2305.14314); rslora: scaled by alpha / √r, "
        "so that a higher rank does not learn more slowly (arXiv:2312.03732); dora, qdora: the "
        "lengths of the weights' rows train apart from their directions (arXiv:2402.09353); pissa, "
        "olora: A and B start at the largest singular values of a weight (arXiv:2404.02948), or at "
        "its QR decomposition (arXiv:2406.01775); loftq: qlora whose adapter starts at what NF4 "
        "loses (arXiv:2310.08659)"
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="the adapter is scaled by alpha / r, with rslora by alpha / √r; default: 2 r, "
        f"with rslora {RSLORA_ALPHA:g}",
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = Field(
        1.0,
        description="learning rate of B, as a multiple of A's (LoRA+, arXiv:2402.12354)",
    )
    experts: bool = Field(
        True,
        description="whether the experts of a mixture of experts get adapters too, each an A and "
        "a B of its own, without dropout; lora, rslora and qlora",
    )
    rank_pattern: dict[Text, Count] = Field(
        default_factory=dict,
        description="r of some layers: regular expression of the end of a name → r, as in PEFT",
    )
    alpha_pattern: dict[Text, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="alpha of some layers, in the same way; others keep `alpha`",
    )

    @property
    def scale_alpha(self) -> float:
        """Alpha as used: the recipe's, or the default of the kind."""
        if self.alpha is not None:
            return self.alpha
        return RSLORA_ALPHA if self.kind == "rslora" else 2.0 * self.r

    @property
    def trains_token_rows(self) -> bool:
        return True

    @property
    def adapts_experts(self) -> bool:
        return self.experts and self.traits.adds_product

    @property
    def has_magnitude(self) -> bool:
        """Whether the lengths of the weights' rows train (DoRA)."""
        return self.kind in ("dora", "qdora")

    @property
    def saves_outputs(self) -> bool:
        return self.has_magnitude

    def learning_rate_scale(self, parameter: str) -> float:
        return self.loraplus_lr_ratio if ".lora_B." in parameter else 1.0

    def peft_config(self) -> dict[str, Any]:
        """The settings of PEFT's LoraConfig."""
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.scale_alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.kind == "rslora",
            "use_dora": self.has_magnitude,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }

    def rank_of(self, layer: str) -> int:
        return value_for(self.rank_pattern, layer, self.r)

    def shapes(self, layer: str, outputs: int, inputs: int) -> Shapes:
        """A, B, and DoRA's magnitude."""
        r = self.rank_of(layer)
        magnitude = ((outputs, 1),) if self.has_magnitude else ()
        return (r, inputs), (outputs, r), *magnitude

    def saved_elements(self, layer: str, outputs: int, inputs: int) -> int:
        return self.rank_of(layer) * (1 + self.traits.counts_from_start)

    def multiplied_elements(self, layer: str, outputs: int, inputs: int) -> int:
        return self.saved_elements(layer, outputs, inputs) * (inputs + outputs)

    def check_layers(self, layers: Sequence[str]) -> None:
        check_patterns(self.rank_pattern, layers, "method.rank_pattern")
        check_patterns(self.alpha_pattern, layers, "method.alpha_pattern")
