"""Sources of training rows, from the entries that the tools have for a dataset."""

from __future__ import annotations

from typing import Any

from dtrain.importing.foreign_config import ForeignConfig

SUBSET = "a source has no subset: save it as files, and name these in `path`"


def sources_of(
    data: ForeignConfig, row_format: str, columns: dict[str, str], paths: list[str]
) -> list[dict[str, Any]]:
    """The sources of a dataset; notes the keys that all tools share.

    Args:
        data: the group of the dataset's keys.
        row_format: dtrain's.
        columns: dtrain's name of a column → its name in the files.
        paths: files, folders, or a hub id.
    """
    common: dict[str, Any] = {"format": row_format}
    if renamed := {ours: theirs for ours, theirs in columns.items() if ours != theirs}:
        common["columns"] = renamed
    if split := data.get("split"):
        data.note(data.source + "split", split, "split")
        common |= {"split": split} if split != "train" else {}
    data.leave("name", "subset", why=SUBSET)
    return [{"path": path, **common} for path in paths]


def held_out_set(config: ForeignConfig, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """An evaluation set with the settings of the stage's own data."""
    names = ("sequence_length", "packing", "overlong", "train_on", "template")
    data = config.stage["data"]
    shared = {name: data[name] for name in names if name in data}
    return {"kind": config.stage["kind"], **shared, "sources": sources}
