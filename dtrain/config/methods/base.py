"""What the settings of all fine-tuning methods share, and the traits that need no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

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


class MethodSettings(Group):
    """The keys that all methods share.

    Attributes:
        traits_by_kind: the traits of each kind that these settings have.
    """

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]]
    kind: str

    @property
    def traits(self) -> MethodTraits:
        """The traits of this kind."""
        return self.traits_by_kind[self.kind]

    @property
    def adapter(self) -> AdapterSettings | None:
        """These settings, if the method adds an adapter to linear layers."""
        return None


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
