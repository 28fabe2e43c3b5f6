"""Write a store: one shard after another, each complete or absent, then the plan and manifest."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtrain.core.errors import EmptyDataError
from dtrain.core.files import fsync_folder, write_atomic, write_sealed
from dtrain.core.hashes import file_hash
from dtrain.core.ownership import open_in_place
from dtrain.data.packing import (
    Packing,
    PackingPlan,
    keep_sequences,
    pack_one_document,
    pack_one_example,
    pack_stream,
    pack_whole,
)
from dtrain.data.store import MANIFEST, PLAN_FILES, SHARD, SUMS, ShardColumns, map_shard, shard_name
from dtrain.data.tokenize import EMPTY, MASKED, NO_TARGETS, TOO_LONG, Document

Int64s = NDArray[np.int64]

NOTE = b"dtrain"  # key of a shard's own counts in its Arrow schema


def write_shard(
    path: Path, documents: list[Document], rows_read: int, counts: Counter[str]
) -> None:
    """Write a shard.

    Args:
        path: of the shard.
        documents: of the shard.
        rows_read: rows of the source that were read for it and for the shards before it.
        counts: of this shard alone: documents cut, left out, …
    """
    note = {"rows_read": rows_read, "counts": dict(counts)}
    batch = pa.record_batch(
        {
            "tokens": _list_array([d.tokens for d in documents]),
            "target_runs": _list_array([d.target_runs for d in documents]),
            "file_index": pa.array([d.file_index for d in documents], pa.int32()),
            "row_number": pa.array([d.row_number for d in documents], pa.int64()),
            "label": pa.array([d.label for d in documents], pa.int32()),
        }
    ).replace_schema_metadata({NOTE: json.dumps(note).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch)
    write_atomic(path, sink.getvalue().to_pybytes())


@dataclass(frozen=True)
class ShardTotals:
    """What packing needs of all shards.

    Attributes:
        lengths, targets: tokens and target tokens of each document, [documents].
        starts_example: whether a document is the first of its row, bool [documents].
        largest_token: -1 if there is none.
    """

    lengths: Int64s
    targets: Int64s
    starts_example: NDArray[np.bool_]
    largest_token: int
    counts: Counter[str]


class StoreWriter:
    """Completes a store whose shards are written."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder, self.shards = folder, shards

    def finish(
        self,
        *,
        packing: Packing,
        packed: bool,
        sequence_length: int,
        extra: dict[str, Any],
        where: str,
    ) -> None:
        """Pack the documents; write the plan, hashes and the manifest.

        Args:
            packing: how documents share sequences.
            packed: whether they do; otherwise each example has a sequence of its own.
            sequence_length: tokens of a sequence.
            extra: more entries of the manifest.
            where: the source, for a message.

        Raises:
            EmptyDataError: there is no target token in the whole source.
        """
        totals = self._survey()
        plan = _pack(totals, packing, packed, sequence_length)
        by_segment = totals.targets[plan.segments["document"]]
        if packing is Packing.STREAM:  # the first token of a segment has no context
            by_segment = plan.segments["tokens"].astype(np.int64) - 1
        targets = _sum_by_sequence(plan, by_segment)
        counts = {**totals.counts, NO_TARGETS: int((targets == 0).sum())}
        plan, targets = keep_sequences(plan, targets > 0), targets[targets > 0]
        if not targets.size:
            raise _no_targets(counts, where)
        starts = totals.starts_example[plan.segments["document"]].astype(np.int64)
        self._write_plan(plan, targets, _sum_by_sequence(plan, starts))
        self._seal(
            {
                **extra,
                "sequence_length": sequence_length,
                "sequences": targets.size,
                "documents": totals.lengths.size,
                "tokens": int(plan.segments["tokens"].sum()),
                "supervised_tokens": int(targets.sum()),
                "longest_segment": int(plan.segments["tokens"].max()),
                "largest_token": totals.largest_token,
                "counts": counts,
            }
        )

    def _write_plan(self, plan: PackingPlan, targets: Int64s, examples: Int64s) -> None:
        tokens = _sum_by_sequence(plan, plan.segments["tokens"].astype(np.int64))
        arrays: dict[str, NDArray[Any]] = {
            "segments.npy": plan.segments,
            "sequences.npy": plan.sequences,
            "sequence_tokens.npy": tokens.astype(np.int32),
            "sequence_targets.npy": targets.astype(np.int32),
            "sequence_examples.npy": examples.astype(np.int32),
            "shards.npy": self._shard_table(),
        }
        for name in PLAN_FILES:
            _write_array(self.folder / name, arrays[name])

    def _columns(self, shard: int) -> ShardColumns:
        return map_shard(self.folder / shard_name(shard))

    def _survey(self) -> ShardTotals:
        lengths, targets, starts, counts, largest = [], [], [], Counter[str](), -1
        for shard in range(self.shards):
            columns = self._columns(shard)
            lengths.append(np.diff(columns.token_offsets))
            runs = columns.target_runs.astype(np.int64)
            ends = np.concatenate([[0], np.cumsum(runs[1::2] - runs[::2])])
            targets.append(np.diff(ends[columns.run_offsets // 2]))
            changes = (np.diff(columns.file_index) != 0) | (np.diff(columns.row_number) != 0)
            starts.append(np.append(True, changes)[: columns.file_index.size])
            counts.update(json.loads(columns.metadata[NOTE])["counts"])
            largest = max(largest, int(columns.tokens.max(initial=-1)))
        return ShardTotals(
            np.concatenate(lengths).astype(np.int64),
            np.concatenate(targets).astype(np.int64),
            np.concatenate(starts).astype(bool),
            largest,
            counts,
        )

    def _shard_table(self) -> NDArray[np.void]:
        table = np.zeros(self.shards, dtype=SHARD)
        first = 0
        for shard in range(self.shards):
            path = self.folder / shard_name(shard)
            table[shard] = first, path.stat().st_size
            first += self._columns(shard).file_index.size
        return table

    def _seal(self, manifest: dict[str, Any]) -> None:
        names = [*PLAN_FILES, *(shard_name(shard) for shard in range(self.shards))]
        sums = {name: file_hash(self.folder / name) for name in names}
        listing = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        write_atomic(self.folder / SUMS, listing)
        sums[SUMS] = file_hash(self.folder / SUMS)
        files = {
            name: {"bytes": (self.folder / name).stat().st_size, "blake3": sums[name]}
            for name in (*PLAN_FILES, SUMS)
        }
        fsync_folder(self.folder)
        write_sealed(self.folder / MANIFEST, {**manifest, "shards": self.shards, "files": files})


def _no_targets(counts: dict[str, int], where: str) -> EmptyDataError:
    causes = {
        MASKED: "{} without an answer that fits in a sequence",
        TOO_LONG: "{} longer than a sequence",
        EMPTY: "{} empty",
    }
    reasons = [text.format(f"{counts[key]:,}") for key, text in causes.items() if counts.get(key)]
    return EmptyDataError(
        f"no trainable tokens in this source: of its rows, {', '.join(reasons) or 'all too short'}",
        where=where,
        fix="check the answers (role: assistant, or `output`), `template` and `sequence_length`",
    )


def _pack(totals: ShardTotals, packing: Packing, packed: bool, capacity: int) -> PackingPlan:
    if packing is Packing.STREAM:
        return (pack_stream if packed else pack_one_document)(totals.lengths, capacity)
    firsts = np.flatnonzero(totals.starts_example)
    example_sizes = np.diff(np.append(firsts, totals.lengths.size))
    if not packed:
        return pack_one_example(totals.lengths, example_sizes)
    return pack_whole(totals.lengths, capacity, example_sizes)


def _sum_by_sequence(plan: PackingPlan, by_segment: Int64s) -> Int64s:
    ends = np.concatenate([[0], np.cumsum(by_segment)])
    return np.diff(ends[plan.sequences])


def _list_array(arrays: list[NDArray[np.int32]]) -> pa.LargeListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([array.size for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()))


def _write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array without a temporary file: it counts only once the manifest names it."""
    with open(open_in_place(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        # Into an open file numpy writes by itself, and reports a full disk without saying so.
        np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
