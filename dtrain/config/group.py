"""The base class of the recipe's groups of keys, and the types that their values share."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
MAX_COUNT = 10**15  # sizes that are computed from a count are int64
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
MAX_FLOAT = 3.4e38  # of float32
Text = Annotated[str, Field(min_length=1)]


def _check_path(text: str) -> str:
    """Check that a path can be one; the rest of it is checked where it is used."""
    try:
        if "://" not in text:
            user_path(text)
    except UserError as error:
        raise ValueError(error.message) from error
    return text


PathText = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]


class Group(BaseModel):
    """A group of keys: unknown keys and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_floats(self) -> Self:
        """Check that no number becomes infinite in float32."""
        for name, field in vars(self).items():
            values = field.values() if isinstance(field, dict) else [field]
            if any(isinstance(x, float) and abs(x) > MAX_FLOAT for x in values):
                raise ValueError(f"{name} has a number that float32 cannot hold")
        return self
