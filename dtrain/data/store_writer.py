"""Writing a store: shard after shard, each whole or not there, then the plan, then the manifest."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtrain.core.errors import EmptyDataError
from dtrain.core.files import fsync_folder, write_atomic, write_sealed
from dtrain.core.hashes import file_hash
from dtrain.data.packing import (
    Packing,
    PackingPlan,
    keep_sequences,
    pack_one_document,
    pack_one_example,
    pack_stream,
    pack_whole,
)
from dtrain.data.store import (
    MANIFEST,
    PLAN_FILES,
    SHARD,
    SUMS,
    Columns,
    map_shard,
    shard_name,
)
from dtrain.data.tokenize import EMPTY, MASKED, TOO_LONG, UNLEARNABLE, Document

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
            "tokens": _lists([d.tokens for d in documents]),
            "runs": _lists([d.runs for d in documents]),
            "part": pa.array([d.part for d in documents], pa.int32()),
            "number": pa.array([d.number for d in documents], pa.int64()),
            "label": pa.array([d.label for d in documents], pa.int32()),
        }
    ).replace_schema_metadata({NOTE: json.dumps(note).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch)
    write_atomic(path, sink.getvalue().to_pybytes())


class StoreWriter:
    """Makes a store of its shards."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder, self.shards = folder, shards

    def finish(
        self,
        *,
        packing: Packing,
        packed: bool,
        sequence_length: int,
        about: dict[str, Any],
        where: str,
    ) -> None:
        """Plan the rows, write plan, hashes and manifest.

        Args:
            packing: how documents share sequences.
            packed: whether they do; otherwise each example has its own.
            sequence_length: tokens of a row.
            about: what the manifest says besides.
            where: the source, for a message.

        Raises:
            UserError: there is no token to learn in the whole source.
        """
        lengths, supervised, starts, summary = self._survey()
        sizes = np.diff(np.append(np.flatnonzero(starts), lengths.size))
        plan = _plan(lengths, sizes, packing, packed, sequence_length)
        per_piece = supervised[plan.pieces["document"]]
        if packing is Packing.STREAM:  # the first token of a segment has no context
            per_piece = plan.pieces["tokens"].astype(np.int64) - 1
        learnt = _row_sums(plan, per_piece)
        summary["counts"][UNLEARNABLE] = int((learnt == 0).sum())
        plan, learnt = keep_sequences(plan, learnt > 0), learnt[learnt > 0]
        if not learnt.size:
            raise _nothing_to_learn(summary["counts"], where)
        examples = _row_sums(plan, starts[plan.pieces["document"]].astype(np.int64))
        self._write_plan(plan, learnt, examples)
        tokens, targets = int(plan.pieces["tokens"].sum()), int(learnt.sum())
        totals = {
            "rows": learnt.size,
            "tokens": tokens,
            "supervised_tokens": targets,
            "longest_segment": int(plan.pieces["tokens"].max()),
        }
        self._seal({**about, "sequence_length": sequence_length, **totals, **summary})

    def _write_plan(self, plan: PackingPlan, learnt: Int64s, examples: Int64s) -> None:
        tokens = _row_sums(plan, plan.pieces["tokens"].astype(np.int64)).astype(np.int32)
        arrays: dict[str, NDArray[Any]] = {
            "pieces.npy": plan.pieces,
            "rows.npy": plan.rows,
            "sequence_tokens.npy": tokens,
            "sequence_targets.npy": learnt.astype(np.int32),
            "sequence_examples.npy": examples.astype(np.int32),
            "shards.npy": self._shard_table(),
        }
        for name in PLAN_FILES:
            _save(self.folder / name, arrays[name])

    def _columns(self, shard: int) -> Columns:
        return map_shard(self.folder / shard_name(shard))

    def _survey(self) -> tuple[Int64s, Int64s, NDArray[np.bool_], dict[str, Any]]:
        """Tokens and supervised tokens of each document, whether it is the first of its row, and
        totals over all shards."""
        lengths, supervised, starts, counts, largest = [], [], [], Counter[str](), -1
        for shard in range(self.shards):
            columns = self._columns(shard)
            lengths.append(np.diff(columns.token_offsets))
            runs = columns.runs.astype(np.int64)
            ends = np.concatenate([[0], np.cumsum(runs[1::2] - runs[::2])])
            supervised.append(np.diff(ends[columns.run_offsets // 2]))
            changes = (np.diff(columns.part) != 0) | (np.diff(columns.number) != 0)
            starts.append(np.append(True, changes)[: columns.part.size])
            counts.update(_note(columns)["counts"])
            largest = max(largest, int(columns.tokens.max(initial=-1)))
        documents = int(sum(part.size for part in lengths))
        summary = {"documents": documents, "largest_token": largest, "counts": dict(counts)}
        return _joined(lengths), _joined(supervised), _joined(starts).astype(bool), summary

    def _shard_table(self) -> NDArray[np.void]:
        table = np.zeros(self.shards, dtype=SHARD)
        first = 0
        for shard in range(self.shards):
            path = self.folder / shard_name(shard)
            table[shard] = first, path.stat().st_size
            first += self._columns(shard).part.size
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


def _nothing_to_learn(counts: dict[str, int], where: str) -> EmptyDataError:
    reasons = {
        MASKED: "{} without an answer that fits in a sequence",
        TOO_LONG: "{} longer than a sequence",
        EMPTY: "{} empty",
    }
    told = [text.format(f"{counts[key]:,}") for key, text in reasons.items() if counts.get(key)]
    return EmptyDataError(
        f"there is nothing to learn in it: of its rows, {', '.join(told) or 'all too short'}",
        where=where,
        fix="check the answers (role: assistant, or `output`), `template` and `sequence_length`",
    )


def _plan(
    lengths: Int64s, example_sizes: Int64s, packing: Packing, packed: bool, capacity: int
) -> PackingPlan:
    if packing is Packing.STREAM:
        return (pack_stream if packed else pack_one_document)(lengths, capacity)
    if not packed:
        return pack_one_example(lengths, example_sizes)
    return pack_whole(lengths, capacity, example_sizes)


def _row_sums(plan: PackingPlan, per_piece: Int64s) -> Int64s:
    ends = np.concatenate([[0], np.cumsum(per_piece)])
    return np.diff(ends[plan.rows])


def _joined(arrays: list[NDArray[Any]]) -> Int64s:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)


def _note(columns: Columns) -> dict[str, Any]:
    note: dict[str, Any] = json.loads(columns.metadata[NOTE])
    return note


def _lists(arrays: list[NDArray[np.int32]]) -> pa.LargeListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([array.size for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()))


def _save(path: Path, array: NDArray[Any]) -> None:
    """Write an array that counts only once the manifest names it: no temporary file needed."""
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
