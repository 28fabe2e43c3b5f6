"""Checkpoints that know names, shapes, ranges and hashes, but neither engines nor ranks."""

from __future__ import annotations

from dtrain.checkpoints.folder import (
    CheckpointInfo,
    clean_leftovers,
    list_checkpoints,
    newest_complete,
    remove_old_checkpoints,
)
from dtrain.checkpoints.identity import (
    CHANGEABLE,
    changes_allowed_in,
    check_changeable,
    check_same_inputs,
    differences,
)
from dtrain.checkpoints.parameter_shards import NEUTRAL_KINDS, ParameterShard
from dtrain.checkpoints.reader import Checkpoint
from dtrain.checkpoints.saver import Saver
from dtrain.core.ownership import Untrusted

__all__ = [
    "CHANGEABLE",
    "NEUTRAL_KINDS",
    "Checkpoint",
    "CheckpointInfo",
    "ParameterShard",
    "Saver",
    "Untrusted",
    "changes_allowed_in",
    "check_changeable",
    "check_same_inputs",
    "clean_leftovers",
    "differences",
    "list_checkpoints",
    "newest_complete",
    "remove_old_checkpoints",
]
