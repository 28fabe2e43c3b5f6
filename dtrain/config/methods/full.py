"""Full fine-tuning, of all parameters or of some: its recipe keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count, Text
from dtrain.config.methods.base import MethodTraits, RouterSettings
from dtrain.config.methods.patterns import match_parameter


class Full(RouterSettings):
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

    frozen_modules: list[Text] = Field(
        default_factory=list,
        description=(
            "parameters that stay frozen, such as [embed_tokens, lm_head]: a pattern (RE2) matches "
            "the end of the name of a parameter or of a module around it"
        ),
    )

    @property
    def trains_all(self) -> bool:
        """Whether no key keeps a parameter frozen."""
        return self.trainable_layers is None and not self.frozen_modules

    def freezes(self, parameter: str) -> bool:
        return match_parameter(self.frozen_modules, parameter) is not None

    def trained_layers(self, layers: int) -> int:
        return min(layers, self.trainable_layers or layers)

    @property
    def trains_outer(self) -> bool:
        matrices = ("model.embed_tokens.weight", "lm_head.weight")
        return self.trainable_layers is None and not all(map(self.freezes, matrices))
