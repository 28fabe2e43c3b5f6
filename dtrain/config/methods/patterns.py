"""PEFT's patterns: regular expressions that give some layers a value of their own.

A pattern matches the end of a layer's name. Of a parameter it matches the end of its name, or of
the name of a module that contains it: `lora_B` and `layers.0` match whatever is inside.

They are matched by RE2, in time linear in the name. Python's `re`, which PEFT uses, backtracks:
with it a pattern such as `(a+)+b` in a downloaded adapter could keep a merge busy for years.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

import re2

from dtrain.core.errors import UserError, nearest_name

Value = TypeVar("Value")


@cache
def compile_pattern(pattern: str, where: str = "") -> Any:
    """The expression that PEFT's get_pattern_key makes of a pattern.

    Args:
        where: the file that it comes from, for messages.

    Raises:
        UserError: it is no regular expression, or cannot be matched in linear time.
    """
    expression, options = rf"(.*\.)?({pattern})$", re2.Options()
    options.log_errors = False
    try:
        re.compile(expression)
        return re2.compile(expression, options)
    except re.error as error:
        message = f"{pattern!r} is not a regular expression: {error}"
        fix = "write the end of a layer's name, such as q_proj"
        raise UserError(message, where=where, fix=fix) from error
    except re2.error as error:
        raise UserError(
            f"{pattern!r} cannot be matched in linear time: {error.args[0].decode()}",
            where=where,
            fix="write it without lookaround, backreferences and large repetitions",
        ) from error


def match_parameter(patterns: Iterable[str], parameter: str) -> str | None:
    """The first pattern that matches a parameter or a module that contains it, or None.

    Raises:
        UserError: as `compile_pattern`.
    """
    patterns = list(patterns)
    if not patterns:  # as in most recipes; a plan asks a hundred thousand times
        return None
    parts = parameter.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    expressions = ((pattern, compile_pattern(pattern)) for pattern in patterns)
    return next((p for p, e in expressions if any(e.match(name) for name in names)), None)


def check_parameter_patterns(
    patterns: Iterable[str], parameters: Iterable[str], where: str
) -> None:
    """Check that each pattern matches a parameter first.

    Raises:
        UserError: one has no effect.
    """
    patterns, parameters = list(patterns), list(parameters)
    used = {match_parameter(patterns, parameter) for parameter in parameters}
    for pattern in patterns:
        if pattern not in used:
            close = get_close_matches(pattern, {p for n in parameters for p in n.split(".")}, n=3)
            names = sorted({name.removesuffix(".weight") for name in parameters})
            example = f"{names[0]} … {names[-1]}" if names else "none"
            example = f"{', '.join(close)} or {example}" if close else example
            raise UserError(
                f"{pattern!r} has no effect: it matches no parameter that trains, or only those "
                "that an earlier pattern matches",
                where=where,
                fix=f"a pattern matches the end of a name, such as those of {example}",
            )


def first_match(patterns: Mapping[str, Value] | None, module: str) -> str | None:
    """The first pattern that matches a module's name, as in PEFT; None without a match.

    Raises:
        UserError: as `compile_pattern`.
    """
    return next((p for p in patterns or {} if compile_pattern(p).match(module)), None)


def value_for(patterns: Mapping[str, Value] | None, module: str, default: Value) -> Value:
    """The value of the first pattern that matches a module's name, or `default`.

    Raises:
        UserError: as `compile_pattern`.
    """
    pattern = first_match(patterns, module)
    return default if pattern is None else (patterns or {})[pattern]


def by_names(patterns: Mapping[str, Value], modules: Iterable[str]) -> dict[str, Value]:
    """Patterns with the same values that name each matching module, which PEFT can match fast."""
    names: dict[str, list[str]] = {}
    for module in modules:
        if (pattern := first_match(patterns, module)) is not None:
            names.setdefault(pattern, []).append(re.escape(module))
    return {"|".join(matching): patterns[pattern] for pattern, matching in names.items()}


def check_patterns(patterns: Mapping[str, Value], modules: Sequence[str], where: str) -> None:
    """Check that each pattern decides the value of a module: PEFT ignores one that does not.

    Args:
        modules: names of those that have an adapter.

    Raises:
        UserError: a pattern matches none, or only modules that an earlier pattern matches.
    """
    used = {first_match(patterns, module) for module in modules}
    for pattern in patterns:
        if pattern in used:
            continue
        if any(first_match({pattern: 0}, module) for module in modules):
            message, fix = f"earlier patterns match all that {pattern!r} matches", "put it first"
            raise UserError(message, where=where, fix=fix)
        names = sorted({*modules, *(module.rpartition(".")[2] for module in modules)})
        fix = f"choose from: {', '.join(name for name in names if '.' not in name)}"
        fix = nearest_name(pattern, names, fix, most=3)
        raise UserError(f"no layer with an adapter is named {pattern!r}", where=where, fix=fix)


def match_names(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Match as PEFT does: names that are equal to a target, or ending with it after a dot."""
    endings = tuple(f".{target}" for target in targets)
    return [name for name in names if f".{name}".endswith(endings)]
