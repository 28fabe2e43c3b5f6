"""How files and folders of checkpoints are called."""

from __future__ import annotations

import re
from pathlib import Path

REMOVED_PREFIX = ".removed."
_STEP = re.compile(r"step-(\d{6,})")
_WORK = re.compile(r"\.step-(\d{6,})\..+")


def step_name(step: int) -> str:
    """Folder of a complete checkpoint."""
    return f"step-{step:06d}"


def work_name(step: int, attempt: str) -> str:
    """Folder of a checkpoint that is being written."""
    return f".{step_name(step)}.{attempt}"


def shard_name(rank: int) -> str:
    """File of one rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def record_name(rank: int) -> str:
    """File that says what one rank wrote; gone once the manifest is there."""
    return f"rank-{rank:05d}.json"


def failed_name(rank: int) -> str:
    """File in which a rank tells rank 0 why it could not save."""
    return f"rank-{rank:05d}.failed"


def step_of(folder: Path) -> int | None:
    """Step of a complete checkpoint's folder, by its name; None for any other folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def unfinished_step_of(folder: Path) -> int | None:
    """Step of a folder whose save was not finished, by its name; None for any other folder."""
    match = _WORK.fullmatch(folder.name)
    return int(match[1]) if match else None
