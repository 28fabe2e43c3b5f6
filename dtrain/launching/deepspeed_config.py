"""Finds the DeepSpeed file of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.config import deepspeed_file
from dtrain.core.errors import UserError

_PACKAGE = Path(__file__).parent.parent
_PLACES = (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs")  # a wheel's; a checkout's


def load_ds_config(path: Path | None, kind: str, offload: bool) -> dict[str, Any]:
    """Read and check a DeepSpeed file; every "auto" is left for the engine to fill.

    Args:
        path: the recipe's `engine.config`, or None for the file that comes with dtrain.
        kind: zero2 or zero3.
        offload: the recipe's `engine.offload`.

    Raises:
        UserError: it cannot be read, or says something else than the recipe.
    """
    return deepspeed_file.read(path or shipped_ds_config(kind, offload), kind, offload)


def shipped_ds_config(kind: str, offload: bool) -> Path:
    """The file in ds_configs/ for an engine."""
    name = f"{kind}_offload.json" if offload else f"{kind}.json"
    for folder in _PLACES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name} is missing", where=str(_PLACES[0]), fix="install dtrain again")
