"""What a folder is by the files in it: a run, a checkpoint, an adapter or a model."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from dtrain.core.run_dir import RunDir
from dtrain.core.stage_dir import ADAPTER_CONFIG, CHECKPOINT_MANIFEST

MODEL_CONFIG = "config.json"
CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")


class FolderKind(Enum):
    """The kinds of folders that verbs accept."""

    RUN = "run"
    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"
    MODEL = "model"


def folder_kind(folder: Path) -> FolderKind | None:
    """Return what a folder is, by the files in it; None if it is none of these.

    A folder with both an adapter and a model is a model.
    """
    if RunDir(folder).recipe.is_file():
        return FolderKind.RUN
    if CHECKPOINT_NAME.fullmatch(folder.name) and (folder / CHECKPOINT_MANIFEST).is_file():
        return FolderKind.CHECKPOINT
    if (folder / MODEL_CONFIG).is_file():
        return FolderKind.MODEL
    return FolderKind.ADAPTER if (folder / ADAPTER_CONFIG).is_file() else None
