"""Rows of stores into the arrays of a micro-batch: by collate.cpp in one pass, or by numpy.

Shapes: T tokens, K targets, D documents, R rows.
"""

from __future__ import annotations

from collections import deque
from ctypes import CDLL, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtrain.core.cpp_build import load_library
from dtrain.data.packing import Segments, ranges
from dtrain.data.store import OPEN_SHARDS, Columns, Store, damaged

Int64s = NDArray[np.int64]

DONE, CLOSED = 0, 1  # what collate.cpp returns; else a store is damaged
# Of its structures, each field of 8 bytes.
SHARD = ("tokens", "token_offsets", "runs", "run_offsets", "labels", "sizes", "sizes", "sizes")
STATE = ("tokens", "targets", "documents", "row", "piece", "source", "shard")


class CollatedBatch(NamedTuple):
    """Some rows, one after the other.

    Attributes:
        ids, positions: int64 [1, T]; positions start from 0 in each document.
        predict, targets: int64 [K], places whose next token is learnt, and those tokens.
        documents, labels: int64 [D], numbers (over all sources) and labels of the documents.
        lengths: tokens of each document, [D].
        row_tokens: tokens of each row, [R].
    """

    ids: Int64s
    positions: Int64s
    target_positions: Int64s
    targets: Int64s
    documents: Int64s
    labels: Int64s
    lengths: list[int]
    sequence_tokens: list[int]


def collate_segments(pieces: Segments) -> CollatedBatch:
    """The arrays of the rows that these pieces make, by numpy."""
    ids = np.concatenate(pieces.views, dtype=np.int64)
    starts = np.cumsum(pieces.sizes) - pieces.sizes
    counts = pieces.run_stops - pieces.run_starts
    target_positions = ranges(starts[pieces.run_pieces] + pieces.run_starts - 1, counts)
    sequence_tokens = np.bincount(pieces.rows, pieces.sizes).astype(np.int64)
    return CollatedBatch(
        ids[None],
        ranges(np.zeros_like(starts), pieces.sizes)[None],
        target_positions,
        ids[target_positions + 1],
        pieces.documents,
        pieces.labels,
        pieces.sizes.tolist(),
        sequence_tokens.tolist(),
    )


def build_native_collator(stores: list[Store], sequence_tokens: int) -> NativeCollator | None:
    """What reads rows by the compiled loop; None where there is no compiler.

    Args:
        stores: of all sources, whose rows are counted one after the other.
        row_tokens: the most that a row has.
    """
    loops = _loops()
    return NativeCollator(loops, stores, sequence_tokens) if loops else None


@cache
def _loops() -> CDLL | None:
    loops, _ = load_library(Path(__file__).with_name("collate.cpp"))
    if loops:
        pointer, number = c_void_p, c_int64
        loops.gather.argtypes = [pointer, number, pointer, number, pointer, number, pointer]
        loops.gather.restype = c_int64
    return loops


class NativeCollator:
    """Reads rows; keeps the last OPEN_SHARDS shards mapped that it opened."""

    def __init__(self, loops: CDLL, stores: list[Store], sequence_tokens: int) -> None:
        self._loop, self._stores, self._row_tokens = loops.gather, stores, sequence_tokens
        self._shards = [np.zeros((len(store.shards), len(SHARD)), np.int64) for store in stores]
        self._open: deque[tuple[int, int, Columns]] = deque()
        firsts = np.cumsum([0, *(store.rows for store in stores)]).tolist()
        first_documents = np.cumsum([0, *(store.documents for store in stores)]).tolist()
        self._sources = np.array(
            [
                (
                    first, document, _at(store.sequence_offsets),
                    _at(store.pieces), len(store.pieces),
                    _at(store.shards), _at(shards), len(shards),
                )
                for first, document, store, shards in zip(
                    firsts, first_documents, stores, self._shards, strict=False
                )
            ]
        )  # fmt: skip
        self._given = _at(self._sources), len(stores)

    def __call__(self, rows: Int64s) -> CollatedBatch:
        """The rows with these numbers, int64 [R].

        Raises:
            UserError: a store is damaged.
        """
        room = len(rows) * self._row_tokens
        # One block: memory is allocated once for each micro-batch, not seven times.
        block, state = np.empty((7, room), np.int64), np.zeros(len(STATE) + len(rows), np.int64)
        rows = np.ascontiguousarray(rows)
        given = (*self._given, _at(rows), len(rows), _at(block), room, _at(state))
        while (end := self._loop(*given)) == CLOSED:
            self._open_shard(*state[5:7].tolist())
        tokens, targets, documents, _, _, source, _, *sequence_tokens = state.tolist()
        if end != DONE:
            raise damaged(self._stores[source].folder, "its numbers do not fit together")
        return CollatedBatch(
            block[0:1, :tokens],
            block[1:2, :tokens],
            block[2, :targets],
            block[3, :targets],
            block[5, :documents],
            block[6, :documents],
            block[4, :documents].tolist(),
            sequence_tokens,
        )

    def _open_shard(self, source: int, shard: int) -> None:
        if len(self._open) == OPEN_SHARDS:
            old_source, old_shard, _ = self._open.popleft()
            self._shards[old_source][old_shard] = 0
        columns = self._stores[source].map_shard(shard)
        self._open.append((source, shard, columns))
        self._shards[source][shard] = (
            *(_at(columns.tokens), _at(columns.token_offsets)),
            *(_at(columns.runs), _at(columns.run_offsets), _at(columns.label)),
            *(columns.tokens.size, columns.runs.size, columns.part.size),
        )


def _at(array: NDArray[Any]) -> int:
    """Where an array lies, which must have no gaps."""
    return int(array.ctypes.data)
