"""The fine-tuning methods: their recipe keys, and their traits that need no torch.

Config checks, the plan, reports and engines ask `settings.traits` and never compare kinds. What a
method does to a model is in the class of `dtrain/methods/` that its traits name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from dtrain.config.group import Count, Group, Text

AdapterShapes = Callable[[int, int, int], tuple[tuple[int, int], ...]]
"""(outputs, inputs, rank) of a linear layer → the shapes of its adapter's matrices."""


@dataclass(frozen=True)
class MethodTraits:
    """What one kind of method does to memory, checkpoints and the merge.

    Attributes:
        title: name in reports.
        implementation: "module:class" of its `dtrain.methods.base.Method`.
        trains_base: the base's own parameters train; they are kept in float32, and the merged
            model replaces them. Otherwise the base is frozen, in the dtype that computes.
        quantizes_base: the frozen base's linear layers are kept in NF4, 4 bits a weight.
        adapter_shapes: shapes of the float32 matrices that are added to a linear layer; None if
            the method adds none. What is added is saved in PEFT layout.
        cannot_merge: why the result cannot become a plain model; empty if it can.
    """

    title: str
    implementation: str
    trains_base: bool = False
    quantizes_base: bool = False
    adapter_shapes: AdapterShapes | None = None
    cannot_merge: str = ""

    @property
    def adds_adapter(self) -> bool:
        """Whether parameters are added to the base, which stays as it is."""
        return self.adapter_shapes is not None


def _lora_shapes(outputs: int, inputs: int, rank: int) -> tuple[tuple[int, int], ...]:
    return (rank, inputs), (outputs, rank)


TRAITS = {
    "full": MethodTraits(
        title="every parameter",
        implementation="dtrain.methods.full:FullFineTuning",
        trains_base=True,
    ),
    "lora": MethodTraits(
        title="LoRA",
        implementation="dtrain.methods.lora:LoraMethod",
        adapter_shapes=_lora_shapes,
    ),
    "qlora": MethodTraits(
        title="QLoRA",
        implementation="dtrain.methods.lora:LoraMethod",
        quantizes_base=True,
        adapter_shapes=_lora_shapes,
    ),
}


class MethodSettings(Group):
    """The keys that all methods share."""

    kind: str

    @property
    def traits(self) -> MethodTraits:
        """The traits of this kind."""
        return TRAITS[self.kind]

    @property
    def adapter(self) -> AdapterSettings | None:
        """These settings, if the method adds an adapter to linear layers."""
        return None


class Full(MethodSettings):
    """Every parameter trains."""

    kind: Literal["full"]


class AdapterSettings(MethodSettings):
    """The keys that adapters of linear layers share."""

    r: Count = Field(16, description="rank; 8 for simple tasks, 32 to 64 for domain knowledge")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="on the adapter's input")
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = Field(
        "all-linear",
        description="names of the linear layers that get an adapter",
    )

    @property
    def adapter(self) -> AdapterSettings:
        """These settings."""
        return self

    def peft_config(self) -> dict[str, Any]:
        """The settings of adapter_config.json that decide what PEFT computes."""
        raise NotImplementedError


class Lora(AdapterSettings):
    """Low-rank adapters (arXiv:2106.09685); qlora: over a base in NF4 (arXiv:2305.14314)."""

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


Method = Annotated[Full | Lora, Field(discriminator="kind")]
_METHOD: TypeAdapter[MethodSettings] = TypeAdapter(Method)


def parse_method(settings: dict[str, Any]) -> MethodSettings:
    """The method that a checkpoint or a stage's record says it was trained with."""
    return _METHOD.validate_python(settings)
