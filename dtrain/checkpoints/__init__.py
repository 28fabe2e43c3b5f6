"""Checkpoints that know names, shapes, ranges and hashes, but neither engines nor ranks."""

from __future__ import annotations

from dtrain.checkpoints.folder import Listed, clean_leftovers, list_checkpoints, newest_complete
from dtrain.checkpoints.identity import CHANGEABLE, differences, require_same
from dtrain.checkpoints.parameter_shards import NEUTRAL_KINDS, ParameterShard
from dtrain.checkpoints.reader import Checkpoint
from dtrain.checkpoints.retention import retain
from dtrain.checkpoints.saver import Saver
from dtrain.core.ownership import Untrusted

__all__ = [
    "CHANGEABLE",
    "NEUTRAL_KINDS",
    "Checkpoint",
    "Listed",
    "ParameterShard",
    "Saver",
    "Untrusted",
    "clean_leftovers",
    "differences",
    "list_checkpoints",
    "newest_complete",
    "require_same",
    "retain",
]
