"""Methods that train virtual tokens in front of every document: their recipe keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count
from dtrain.config.methods.base import MethodTraits, QuantizableSettings, Shapes


def _traits(title: str, implementation: str) -> MethodTraits:
    return MethodTraits(
        title=title,
        implementation=f"dtrain.methods.prompts:{implementation}",
        adds_adapter=True,
        base_when_disabled=True,
        cannot_merge="its virtual tokens are part of the input",
    )


class PromptSettings(QuantizableSettings):
    """Trained virtual tokens in front of every document; the base stays as it is."""

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "prompt": _traits("prompt tuning", "PromptTuning"),
        "p_tuning": _traits("P-tuning", "PTuning"),
        "prefix": _traits("prefix tuning", "PrefixTuning"),
    }
    kind: Literal["prompt", "p_tuning", "prefix"] = Field(
        description="prompt: their embeddings train (arXiv:2104.08691); p_tuning: so does an MLP "
        "that computes them (arXiv:2103.10385); prefix: their keys and values in every layer train "
        "(arXiv:2101.00190; P-tuning v2, arXiv:2110.07602)"
    )
    virtual_tokens: Count = Field(20, description="in front of every document, also a packed one")

    def outer_shapes(self, hidden: int, layers: int, kv: int) -> Shapes:
        v = self.virtual_tokens
        if self.kind == "prefix":
            return ((v, 2 * layers * kv),)
        mlp = 3 * ((hidden, hidden), (hidden, 1)) if self.kind == "p_tuning" else ()
        return ((v, hidden), *mlp)

    @property
    def added_tokens(self) -> int:
        return self.virtual_tokens
