"""Checks of a stage's method that need several keys, or more than a key's type."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.config.clash import Clash
from dtrain.config.methods import Lora, MethodSettings
from dtrain.config.methods.patterns import compile_pattern
from dtrain.config.schema import Stage
from dtrain.config.yaml_document import Key
from dtrain.core.errors import UserError


def check_method(stage: Stage, at: Key) -> Iterator[Clash]:
    """Errors in a stage's method.

    Args:
        at: the key of the stage.
    """
    yield from _patterns(stage.method, (*at, "method"))


def _patterns(method: MethodSettings, at: Key) -> Iterator[Clash]:
    if not isinstance(method, Lora):
        return
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(method, key):
            try:
                compile_pattern(pattern)
            except UserError as error:
                yield Clash([(*at, key, pattern)], error.message, error.fix)
