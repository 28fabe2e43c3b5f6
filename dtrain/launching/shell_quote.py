"""Quoting of every value that is written into a script."""

from __future__ import annotations

import shlex
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dtrain.core.errors import UserError


def quote(value: object) -> str:
    """`value` as one word of bash that expands to exactly these characters.

    Raises:
        UserError: it contains a NUL, which no argument can.
    """
    text = str(value)
    if "\0" in text:
        raise UserError("a NUL character cannot be passed to a program", where=repr(text))
    return shlex.quote(text)


def render(template: str, **values: Any) -> str:
    """A script from a template of this package; every value is quoted."""
    environment = Environment(
        loader=PackageLoader("dtrain.launching", "."),
        undefined=StrictUndefined,
        finalize=quote,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
