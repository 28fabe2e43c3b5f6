"""Where dtrain keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

SAMPLE_PREFIX = "dtrain:"


def cache_folder() -> Path:
    """`$DTRAIN_CACHE`, else `$XDG_CACHE_HOME/dtrain`, else `~/.cache/dtrain`."""
    if own := os.environ.get("DTRAIN_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dtrain"


def sample_folder(name: str) -> Path:
    """Where the sample model or corpus `name` lies once it is made (dtrain/samples/)."""
    return cache_folder() / "samples" / name


def sample_name(address: str) -> str | None:
    """'dtrain:python-docs/domain.jsonl' → 'python-docs'; None for any other address."""
    if not address.startswith(SAMPLE_PREFIX):
        return None
    return address.removeprefix(SAMPLE_PREFIX).split("/")[0]


def local_path(address: str) -> Path:
    """The path an address of a recipe stands for: a sample's in the cache, else itself."""
    if not address.startswith(SAMPLE_PREFIX):
        return Path(address).expanduser()
    return cache_folder() / "samples" / address.removeprefix(SAMPLE_PREFIX)
