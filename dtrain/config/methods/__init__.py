"""The fine-tuning methods: their recipe keys, and their traits that need no torch.

Config checks, the plan, reports and engines ask `settings.traits` and never compare kinds. What a
method does to a model is in the class of `dtrain/methods/` that its traits name. To add a method,
add its settings in a file here, and name them in `Method`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from dtrain.config.methods.adalora import AdaLora
from dtrain.config.methods.base import (
    AdapterSettings,
    LowRankSettings,
    MethodSettings,
    MethodTraits,
    QuantizableSettings,
)
from dtrain.config.methods.bottleneck import Bottleneck
from dtrain.config.methods.full import Full
from dtrain.config.methods.lora import Lora
from dtrain.config.methods.prompts import PromptSettings
from dtrain.config.methods.vectors import Ia3, Vera
from dtrain.core.errors import UserError

__all__ = [
    "AdaLora",
    "AdapterSettings",
    "Bottleneck",
    "Full",
    "Ia3",
    "Lora",
    "LowRankSettings",
    "Method",
    "MethodSettings",
    "MethodTraits",
    "PromptSettings",
    "Vera",
    "parse_method",
]

Method = Annotated[
    Full | Lora | AdaLora | Ia3 | Vera | Bottleneck | PromptSettings, Field(discriminator="kind")
]
TRAITS: dict[str, MethodTraits] = {
    kind: traits
    for settings in (Full, Lora, AdaLora, Ia3, Vera, Bottleneck, PromptSettings)
    for kind, traits in settings.traits_by_kind.items()
}
_METHOD: TypeAdapter[MethodSettings] = TypeAdapter(Method)


def method_like(method: MethodSettings, kind: str) -> MethodSettings:
    """Settings of another kind, with the same values of the keys that both have."""
    if kind == method.kind:
        return method
    default = parse_method({"kind": kind})
    names = _shared_keys(method, default) | {"r", "target_modules"}
    shared = names & type(method).model_fields.keys() & type(default).model_fields.keys()
    return default.model_copy(update={name: getattr(method, name) for name in shared})


def _shared_keys(method: MethodSettings, other: MethodSettings) -> set[str]:
    """Keys that a recipe sets for a method, and that another has too."""
    return (method.model_fields_set & type(other).model_fields.keys()) - {"kind"}


def over_nf4(method: MethodSettings) -> tuple[MethodSettings, str]:
    """The method to use if the base fits only in NF4, and the recipe's key and value for it."""
    if isinstance(method, QuantizableSettings):
        return method.model_copy(update={"quantize": "nf4"}), "method.quantize=nf4"
    kind = method.traits.quantized_kind
    quantized = method_like(method, kind)
    shared, default = _shared_keys(method, quantized), parse_method({"kind": kind})
    fields = type(default).model_fields
    shared |= {name for name in fields if getattr(quantized, name) != getattr(default, name)}
    if shared <= method.model_fields_set <= shared | {"kind"}:
        return quantized, f"method.kind={kind}"
    # Keys that the other kind lacks must go, and its defaults are its own: all are written.
    values = [f"{name}: {json.dumps(getattr(quantized, name))}" for name in sorted(shared)]
    return quantized, f"method={{{', '.join([f'kind: {kind}', *values])}}}"


def parse_method(settings: dict[str, Any]) -> MethodSettings:
    """The method that a checkpoint or a stage's record says it was trained with.

    Raises:
        UserError: it has other settings than this version of dtrain knows.
    """
    try:
        return _METHOD.validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        message = f"recorded method settings that are not valid here: {first['msg']}"
        where = ".".join(map(str, first["loc"]))
        raise UserError(message, where=where, fix="use the dtrain that wrote them") from error
