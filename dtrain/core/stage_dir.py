"""The folder of a stage in a run: the names of its files, its progress, the record of its merge."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from dtrain.core.errors import UserError
from dtrain.core.files import read_json, read_object

STAGE_RECORD = "stage.json"
METRICS = "metrics.jsonl"
TRACKER_RUNS = "trackers.json"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
MERGED = "merged"
MERGE_MANIFEST = "merge.json"  # in a merged model's folder
NOT_TRAINED = "started"  # progress of a stage before its first checkpoint
CHECKPOINT_MANIFEST = "manifest.json"  # written last: a checkpoint without it is incomplete


class _MergeManifest(TypedDict, total=False):
    format: Any
    plan: str
    source: str
    result: str
    files: dict[str, str]
    adapters: list[dict[str, Any]]


def read_merge_manifest(model: Path, *needed: str) -> dict[str, Any]:
    """The record of how a merged model was made, from its folder.

    Args:
        needed: keys that it must have.

    Raises:
        UserError: it is missing or damaged.
    """
    content: dict[str, Any] = read_json(model / MERGE_MANIFEST, _MergeManifest)
    if missing := [key for key in needed if key not in content]:
        raise UserError(f"has no {missing[0]}", where=str(model / MERGE_MANIFEST))
    return content


@dataclass(frozen=True)
class StageDir:
    """Files of one stage of a run."""

    path: Path

    @property
    def record(self) -> Path:
        """What the stage was made from, and whether it is complete."""
        return self.path / STAGE_RECORD

    @property
    def tracker_runs(self) -> Path:
        """The id of the stage's run in each tracker."""
        return self.path / TRACKER_RUNS

    @property
    def metrics(self) -> Path:
        """Metrics, a line of JSON for each step."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def adapter(self) -> Path:
        """Final adapter in PEFT layout."""
        return self.path / ADAPTER

    @property
    def merged(self) -> Path:
        """Merged model: a plain Hugging Face model."""
        return self.path / MERGED

    @property
    def merge_manifest(self) -> Path:
        """Hashes of the merged model's files; written when it is complete."""
        return self.merged / MERGE_MANIFEST

    @property
    def merge_locks(self) -> Path:
        """Locks of the ranks that merge together."""
        return self.path / ".merging"

    def progress(self) -> str:
        """Name of the newest complete checkpoint, "started" before the first, or "complete"."""
        with suppress(UserError):  # a damaged record: the checkpoints count
            if read_object(self.record).get("complete"):
                return "complete"
        manifests = self.checkpoints.glob(f"step-*/{CHECKPOINT_MANIFEST}")
        names = [path.parent.name for path in manifests]
        return max(names, key=lambda name: (len(name), name), default=NOT_TRAINED)
