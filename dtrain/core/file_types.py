"""Types of values that files contain, and the check that a value has one.

A file may be damaged, or a stranger's: whatever reads one names the type of what it expects where
it reads it, and what uses the value need not look again.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from dtrain.core.errors import UserError

Value = TypeVar("Value")

# Sums and squares of a Number do not overflow, and Seconds since 1970 are in years that dates know.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**60)]
Numbers = dict[str, Number | None]
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+]{0,64}$")]


class Entries(TypedDict, total=False):
    """A JSON object with some known keys; the others may be anything."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]


def check_type(value: Value, kind: Any, where: str) -> Value:
    """Return a value that is of a type, unchanged.

    Args:
        kind: a type that pydantic knows; nothing is converted to it.
        where: the file that the value comes from.

    Raises:
        UserError: it is of another type, with the key.
    """
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(map(str, detail["loc"]))[:200]
        message = detail["msg"][:1].lower() + detail["msg"][1:]
        raise UserError(f"{key}: {message}" if key else message, where=where) from error
    return value


def is_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; see `check_type`."""
    try:
        check_type(value, kind, "")
    except UserError:
        return False
    return True


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
