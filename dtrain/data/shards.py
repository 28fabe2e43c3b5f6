"""Where a source is cut into shards: by its rows alone, whoever makes them and with how many."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.core.cpu_resources import available_cores, available_memory
from dtrain.core.files import write_atomic
from dtrain.core.locks import ShardLocks
from dtrain.core.log import progress
from dtrain.core.processes import ProgressCallback, worker_pool
from dtrain.data.conversations import Conversation
from dtrain.data.records import Record, RecordReader
from dtrain.data.sources import SourceFile
from dtrain.data.store import shard_name
from dtrain.data.store_writer import write_shard
from dtrain.data.tokenize import Document, RowEncoder

# A cut: the part it lies in, how many rows of that part come before it, how many of the source.
BOUNDARY = np.dtype([("part", "<i8"), ("skip", "<i8"), ("row", "<i8")])
BOUNDARIES_FILE = "cuts.npy"

BLOCK_ROWS = 512
BLOCK_CHARACTERS = 1 << 22
MOST_BLOCKS = 16  # in a shard, so that it fits in memory
GOOD_SHARDS = 64  # as many as there can be up to here, so that processes share them evenly

ShardBoundaries = NDArray[np.void]


def find_boundaries(records: Iterator[Record]) -> ShardBoundaries:
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
    return np.array([*blocks[::each], (part, skip, rows)], dtype=BOUNDARY)


def _size(record: Record) -> int:
    if isinstance(record.value, Conversation):
        return sum(len(message["content"]) for message in record.value.messages)
    return len(record.value) if isinstance(record.value, str) else 0


def save_boundaries(folder: Path, cuts: ShardBoundaries) -> None:
    """Keep the cuts of a store that is under way."""
    buffer = io.BytesIO()
    np.save(buffer, cuts, allow_pickle=False)
    write_atomic(folder / BOUNDARIES_FILE, buffer.getvalue())


def load_boundaries(folder: Path) -> ShardBoundaries | None:
    """The cuts of a store that is under way; None before they are made."""
    path = folder / BOUNDARIES_FILE
    if not path.exists():
        return None
    cuts: ShardBoundaries = np.load(path, allow_pickle=False)
    return cuts


BATCH_ROWS = 500  # in one call of the tokenizer
PROCESS_BYTES = 1 << 30  # of a process with a shard of long texts
FEW_ROWS = 2000  # one process is done with them before others could help
CLAIMS_FILE = ".claims"


@dataclass(frozen=True)
class WorkShare:
    """One of several preparations of the same data that work together; all make what is left.

    Attributes:
        number, of: this one, from 0, and how many there are.
    """

    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class ShardBuilder:
    """The shards of a store under way."""

    folder: Path
    cuts: ShardBoundaries
    parts: list[SourceFile]
    form: str
    columns: Mapping[Any, str]
    encoder: RowEncoder

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def path(self, shard: int) -> Path:
        """Where a shard lies once it is made."""
        return self.folder / shard_name(shard)

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(len(self)) if not self.path(shard).exists()]

    def rows(self, shard: int) -> int:
        """Rows of the source that a shard is made of."""
        return int(self.cuts["row"][shard + 1] - self.cuts["row"][shard])

    def make(self, title: str, share: WorkShare, processes: int | None) -> None:
        """Make all shards that nobody else makes; of a single share, wait for those as well.

        Args:
            title: of the progress that is shown.
            share: which part of the source to begin with.
            processes: on this machine; None for as many as cores and memory allow.

        Raises:
            UserError: a row cannot be used.
        """
        left, total = sum(map(self.rows, self.missing())), int(self.cuts["row"][-1])
        count = min(processes or _processes(left), len(self.missing()))

        def work(number: int, tell: ProgressCallback) -> None:
            start = len(self) * (share.number * count + number) // (share.of * count)
            self._make_from(start, tell, wait=False)

        if count > 1:
            self.encoder.warm_up()  # once, before there are several processes
            with worker_pool(count, work) as members, progress(title, total, total - left) as meter:
                members.join(meter.advance)
        if count == 1 or self.missing():  # those of who was killed
            left = sum(map(self.rows, self.missing()))
            with progress(title, total, total - left) as meter:
                start = len(self) * share.number // share.of
                self._make_from(start, meter.advance, wait=share.of == 1)

    def _make_from(self, start: int, tell: ProgressCallback, *, wait: bool) -> None:
        claims = ShardLocks(self.folder / CLAIMS_FILE)
        stretches = RecordReader(self.parts, self.form, self.columns)
        around = [*range(start, len(self)), *range(start)]
        try:
            for gloo_group in (False, wait):
                for shard in around:
                    if not self.path(shard).exists() and claims.acquire(shard, wait=gloo_group):
                        self._make_one(shard, stretches, tell)
                        claims.release(shard)
        finally:
            claims.close()

    def _make_one(self, shard: int, stretches: RecordReader, tell: ProgressCallback) -> None:
        if self.path(shard).exists():  # made by who held the claim
            return
        counts: Counter[str] = Counter()
        documents: list[Document] = []
        part, skip, _ = self.cuts[shard].tolist()
        records = stretches.records(part, skip, self.rows(shard))
        while batch := list(islice(records, BATCH_ROWS)):
            documents += self.encoder.documents(batch, counts)
            tell(len(batch))
        for read in self.parts[max(part, 0) : int(self.cuts["part"][shard + 1]) + 1]:
            read.check_unchanged()  # nothing of another content is kept, even if this ends here
        write_shard(self.path(shard), documents, int(self.cuts["row"][shard + 1]), counts)


def _processes(rows: int) -> int:
    if rows < FEW_ROWS:
        return 1
    return max(1, min(available_cores(), available_memory() // PROCESS_BYTES))
