"""Full fine-tuning: its recipe keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from dtrain.config.methods.base import MethodSettings, MethodTraits


class Full(MethodSettings):
    """Every parameter trains."""

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "full": MethodTraits(
            title="every parameter",
            implementation="dtrain.methods.full:FullFineTuning",
            trains_base=True,
            is_compared=True,
        ),
    }
    kind: Literal["full"]
