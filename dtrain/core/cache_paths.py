"""Paths in the cache, which holds only what dtrain can rebuild."""

from __future__ import annotations

import os
import re
from pathlib import Path

SAMPLE_PREFIX = "dtrain:"


def cache_folder() -> Path:
    """`$DTRAIN_CACHE`, else `$XDG_CACHE_HOME/dtrain`, else `~/.cache/dtrain`."""
    if folder := os.environ.get("DTRAIN_CACHE"):
        return Path(folder).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dtrain"


def sample_folder(name: str) -> Path:
    """Folder of the sample model or corpus `name`, which dtrain/samples/ builds."""
    return cache_folder() / "samples" / name


def sample_name(address: str) -> str | None:
    """'dtrain:python-docs/domain.jsonl' → 'python-docs'; None for any other address."""
    if not address.startswith(SAMPLE_PREFIX):
        return None
    return address.removeprefix(SAMPLE_PREFIX).split("/")[0]


def local_path(address: str) -> Path:
    """The local path of an address in a recipe: samples are in the cache."""
    if not address.startswith(SAMPLE_PREFIX):
        return Path(address).expanduser()
    return cache_folder() / "samples" / address.removeprefix(SAMPLE_PREFIX)


def hub_id(address: str) -> str | None:
    """The address of a model, if it can only be an id on the hub: no sample, folder or path."""
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", address, re.ASCII) is not None
    return address if is_id and not local_path(address).is_dir() else None
