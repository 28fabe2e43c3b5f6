"""Making the shards of a store: any number of processes, on one node or many, share them.

Each shard follows from the source and its two cuts alone, appears whole or not at all, and is
claimed before it is made, so a store has the same bytes whoever made it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain.core.cpu_resources import available_cores, available_memory
from dtrain.core.locks import ShardLocks
from dtrain.core.log import progress
from dtrain.core.processes import Tell, worker_pool
from dtrain.data.records import RecordReader
from dtrain.data.shard_boundaries import Cuts
from dtrain.data.sources import SourceFile
from dtrain.data.store import shard_name
from dtrain.data.store_writer import write_shard
from dtrain.data.tokenize import Document, RowEncoder

BATCH_ROWS = 500  # in one call of the tokenizer
PROCESS_BYTES = 1 << 30  # of a process with a shard of long texts
FEW_ROWS = 2000  # one process is done with them before others could help
CLAIMS_FILE = ".claims"


@dataclass(frozen=True)
class Share:
    """One of several preparations of the same data that work together; all make what is left.

    Attributes:
        number, of: this one, from 0, and how many there are.
    """

    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class Shards:
    """The shards of a store under way."""

    folder: Path
    cuts: Cuts
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

    def make(self, title: str, share: Share, processes: int | None) -> None:
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

        def work(number: int, tell: Tell) -> None:
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

    def _make_from(self, start: int, tell: Tell, *, wait: bool) -> None:
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

    def _make_one(self, shard: int, stretches: RecordReader, tell: Tell) -> None:
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
