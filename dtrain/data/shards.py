"""Write the shards of a store, by any number of processes on one or many nodes.

A source is divided by its rows alone. Each shard follows from the source and its two boundaries,
is locked while it is written, and appears complete or not at all, so a store has the same bytes
no matter how many processes wrote it.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.core.errors import UserError
from dtrain.core.files import write_atomic
from dtrain.core.hardware import workers_that_fit
from dtrain.core.locks import ShardLocks
from dtrain.core.log import progress
from dtrain.core.processes import ProgressCallback, worker_pool
from dtrain.data.conversations import Conversation
from dtrain.data.records import Record, RecordReader
from dtrain.data.sources import SourceFile
from dtrain.data.store import shard_name
from dtrain.data.store_writer import write_shard
from dtrain.data.tokenize import Document, RowEncoder, count_unread_columns

# The file of a boundary, the rows before it in that file, and the rows before it in the source.
BOUNDARY = np.dtype([("file", "<i8"), ("skip", "<i8"), ("row", "<i8")])
BOUNDARIES_FILE = "boundaries.npy"
LOCKS_FILE = ".locks"

BLOCK_ROWS = 512
BLOCK_CHARACTERS = 1 << 22
MAX_BLOCKS = 16  # in a shard, so that it fits in memory
TARGET_SHARDS = 64  # blocks are not combined below this number, so that processes share evenly
BATCH_ROWS = 500  # in one call of the tokenizer
PROCESS_BYTES = 1 << 30  # memory of a process with a shard of long texts
FEW_ROWS = 2000  # for so few rows, starting more processes takes longer than the work

ShardBoundaries = NDArray[np.void]


def find_boundaries(records: Iterator[Record]) -> ShardBoundaries:
    """Divide a source into shards.

    Args:
        records: all rows of the source.

    Returns:
        BOUNDARY [shards + 1], before each shard and after the last; [1] if there are no rows.
    """
    blocks: list[tuple[int, int, int]] = []
    file = skip = rows = in_block = characters = 0
    for record in records:
        file, skip = (file, skip) if record.file_index == file else (record.file_index, 0)
        if not blocks or in_block == BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            blocks.append((file, skip, rows))
            in_block = characters = 0
        skip, rows, in_block = skip + 1, rows + 1, in_block + 1
        characters += _count_characters(record)
    each = min(MAX_BLOCKS, max(1, len(blocks) // TARGET_SHARDS))
    return np.array([*blocks[::each], (file, skip, rows)], dtype=BOUNDARY)


def _count_characters(record: Record) -> int:
    if isinstance(record.value, Conversation):
        return sum(len(message["content"]) for message in record.value.messages)
    return len(record.value) if isinstance(record.value, str) else 0


def save_boundaries(folder: Path, boundaries: ShardBoundaries) -> None:
    """Save the boundaries of an unfinished store."""
    buffer = io.BytesIO()
    np.save(buffer, boundaries, allow_pickle=False)
    write_atomic(folder / BOUNDARIES_FILE, buffer.getvalue())


def load_boundaries(folder: Path) -> ShardBoundaries | None:
    """Load the boundaries of an unfinished store; None if there are none yet."""
    path = folder / BOUNDARIES_FILE
    if not path.exists():
        return None
    boundaries: ShardBoundaries = np.load(path, allow_pickle=False)
    return boundaries


@dataclass(frozen=True)
class WorkShare:
    """One of several processes or nodes that prepare the same data together.

    Attributes:
        number, of: index of this one, from 0, and how many there are. It decides where to begin;
            everyone then continues with whatever is missing.
    """

    number: int = 0
    of: int = 1


def share_of_array(environ: Mapping[str, str]) -> WorkShare:
    """The share of this task of a Slurm array; all of the work outside of an array.

    In an array with gaps (3,7) two tasks may begin at the same shard, as all continue with whatever
    is missing.
    """
    try:
        number, first, count = (
            int(environ[f"SLURM_ARRAY_TASK_{n}"]) for n in ("ID", "MIN", "COUNT")
        )
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        return WorkShare((number - first) // step % count, count)
    except (KeyError, ValueError, ZeroDivisionError):
        return WorkShare()


def parse_share(text: str) -> WorkShare:
    """'2/8' → the second of eight shares.

    Raises:
        UserError: the text is not such a share.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = (int(group) for group in match.groups()) if match else (0, 0)
    if not 1 <= number <= of:
        raise UserError("not a share", where=f"--shard {text}", fix="write 1/8 to 8/8 for eight")
    return WorkShare(number - 1, of)


@dataclass(frozen=True)
class ShardBuilder:
    """Builds the shards of a store."""

    folder: Path
    boundaries: ShardBoundaries
    source_files: list[SourceFile]
    row_format: str
    columns: Mapping[Any, str]
    encoder: RowEncoder

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def path(self, shard: int) -> Path:
        """Path of a finished shard."""
        return self.folder / shard_name(shard)

    def missing(self) -> list[int]:
        """Shards that are not written yet."""
        return [shard for shard in range(len(self)) if not self.path(shard).exists()]

    def count_rows(self, shards: list[int]) -> int:
        """Rows of the source in these shards."""
        return int(np.diff(self.boundaries["row"])[shards].sum())

    def build(self, title: str, share: WorkShare, processes: int | None) -> None:
        """Write all shards that no other process writes; without other shares, wait for those too.

        Args:
            title: of the progress bar.
            share: decides which shard to begin with.
            processes: on this machine; None for as many as cores and memory allow.

        Raises:
            UserError: a row cannot be used.
        """
        left, total = self.count_rows(self.missing()), int(self.boundaries["row"][-1])
        count = min(processes or _choose_processes(left), len(self.missing()))

        def work(number: int, advance: ProgressCallback) -> None:
            start = len(self) * (share.number * count + number) // (share.of * count)
            self._build_from(start, advance, wait=False)

        if count > 1:
            self.encoder.warm_up()  # before the fork, so that processes inherit it
            with worker_pool(count, work) as pool, progress(title, total, total - left) as meter:
                pool.join(meter.advance)
        if count == 1 or self.missing():  # a killed process leaves its shard
            left = self.count_rows(self.missing())
            with progress(title, total, total - left) as meter:
                start = len(self) * share.number // share.of
                self._build_from(start, meter.advance, wait=share.of == 1)

    def _build_from(self, start: int, advance: ProgressCallback, *, wait: bool) -> None:
        locks = ShardLocks(self.folder / LOCKS_FILE)
        reader = RecordReader(self.source_files, self.row_format, self.columns)
        order = [*range(start, len(self)), *range(start)]
        try:
            for waits in (False, wait):
                for shard in order:
                    if not self.path(shard).exists() and locks.acquire(shard, wait=waits):
                        self._build_shard(shard, reader, advance)
                        locks.release(shard)
        finally:
            locks.close()

    def _build_shard(self, shard: int, reader: RecordReader, advance: ProgressCallback) -> None:
        if self.path(shard).exists():  # written by the last holder of the lock
            return
        counts: Counter[str] = Counter()
        documents: list[Document] = []
        first_file, skip, _ = self.boundaries[shard].tolist()
        last_file, _, rows_read = self.boundaries[shard + 1].tolist()
        records = reader.records(first_file, skip, self.count_rows([shard]))
        while batch := list(islice(records, BATCH_ROWS)):
            documents += self.encoder.documents(batch, counts)
            count_unread_columns(batch, counts)
            advance(len(batch))
        for source_file in self.source_files[max(first_file, 0) : last_file + 1]:
            source_file.check_unchanged()  # no shard of changed content is kept
        write_shard(self.path(shard), documents, rows_read, counts)


def _choose_processes(rows: int) -> int:
    if rows < FEW_ROWS:
        return 1
    return workers_that_fit(PROCESS_BYTES)
