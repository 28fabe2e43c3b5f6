"""Where a source is cut into shards: by its rows alone, whoever makes them and with how many."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtrain.core.files import write_atomic
from dtrain.data.conversations import Conversation
from dtrain.data.records import Record

# A cut: the part it lies in, how many rows of that part come before it, how many of the source.
CUT = np.dtype([("part", "<i8"), ("skip", "<i8"), ("row", "<i8")])
CUTS_FILE = "cuts.npy"

BLOCK_ROWS = 512
BLOCK_CHARACTERS = 1 << 22
MOST_BLOCKS = 16  # in a shard, so that it fits in memory
GOOD_SHARDS = 64  # as many as there can be up to here, so that processes share them evenly

Cuts = NDArray[np.void]


def cut(records: Iterator[Record]) -> Cuts:
    """Cuts [shards + 1] before each shard and after the last one; [1] of no rows.

    Args:
        records: all rows of a source.
    """
    blocks: list[tuple[int, int, int]] = []
    part = skip = rows = in_block = characters = 0
    for record in records:
        part, skip = (part, skip) if record.file_index == part else (record.file_index, 0)
        if not blocks or in_block == BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            blocks.append((part, skip, rows))
            in_block = characters = 0
        skip, rows, in_block = skip + 1, rows + 1, in_block + 1
        characters += _size(record)
    each = min(MOST_BLOCKS, max(1, len(blocks) // GOOD_SHARDS))
    return np.array([*blocks[::each], (part, skip, rows)], dtype=CUT)


def _size(record: Record) -> int:
    if isinstance(record.value, Conversation):
        return sum(len(message["content"]) for message in record.value.messages)
    return len(record.value) if isinstance(record.value, str) else 0


def save_cuts(folder: Path, cuts: Cuts) -> None:
    """Keep the cuts of a store that is under way."""
    buffer = io.BytesIO()
    np.save(buffer, cuts, allow_pickle=False)
    write_atomic(folder / CUTS_FILE, buffer.getvalue())


def load_cuts(folder: Path) -> Cuts | None:
    """The cuts of a store that is under way; None before they are made."""
    path = folder / CUTS_FILE
    if not path.exists():
        return None
    cuts: Cuts = np.load(path, allow_pickle=False)
    return cuts
