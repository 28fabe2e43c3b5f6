"""The shape of an architecture that the plan does not compute itself: a child process builds it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from dtrain.core.errors import UserError
from dtrain.planning.model_process import has_torch, run_child
from dtrain.planning.shapes import ModelShape


def build_shape(config: dict[str, Any], where: str) -> ModelShape:
    """The shape of the model that transformers builds from a config, without weights.

    Args:
        where: source of the config, for messages.

    Raises:
        UserError: torch is missing, or transformers or dtrain does not know the architecture.
    """
    if not has_torch():
        raise UserError(
            f"the plan does not know model_type {config.get('model_type')!r} without torch, which "
            "is not installed here",
            where=where,
            fix="plan where dtrain is installed with torch; dtrain run needs no plan",
        )
    return _build(json.dumps(config), where)


@lru_cache(maxsize=8)
def _build(config: str, where: str) -> ModelShape:
    fix = "dtrain run needs no plan"
    for line in run_child({"describe": json.loads(config), "where": where}, fix):
        if "shape" in line:
            shape: ModelShape = TypeAdapter(ModelShape).validate_python(line["shape"])
            return shape
    raise UserError("the child process sent no shape", where=where, fix=fix)
