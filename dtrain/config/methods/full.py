"""Full fine-tuning, of all layers or of the last ones: its recipe keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count
from dtrain.config.methods.base import MethodSettings, MethodTraits


class Full(MethodSettings):
    """The base's own parameters train."""

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "full": MethodTraits(
            title="every parameter",
            implementation="dtrain.methods.full:FullFineTuning",
            trains_base=True,
            is_compared=True,
        ),
    }
    kind: Literal["full"]
    trainable_layers: Count | None = Field(
        None,
        description=(
            "train only so many decoder layers, the last ones; everything else stays frozen, in "
            "`model.dtype`. Default: every parameter trains"
        ),
    )

    def trained_layers(self, layers: int) -> int:
        return min(layers, self.trainable_layers or layers)

    @property
    def trains_outer(self) -> bool:
        return self.trainable_layers is None
