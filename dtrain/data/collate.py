"""Collate sequences of stores into the arrays of a micro-batch, by collate.cpp or by numpy.

Letters: T tokens, K targets, D documents, S sequences.
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
from dtrain.data.store import OPEN_SHARDS, ShardColumns, Store, damaged_store

Int64s = NDArray[np.int64]

DONE, CLOSED = 0, 1  # what collate.cpp returns; anything else means that a store is damaged
# Fields of its structures, 8 bytes each.
SHARD = ("tokens", "token_offsets", "runs", "run_offsets", "labels", "sizes", "sizes", "sizes")
STATE = ("tokens", "targets", "documents", "sequence", "segment", "source", "shard")


class CollatedBatch(NamedTuple):
    """Sequences laid end to end.

    Attributes:
        ids, positions: int64 [1, T]; positions start from 0 in each document.
        target_positions, targets: int64 [K], positions whose next token is a target, and those
            tokens.
        documents, labels: int64 [D], numbers (over all sources) and labels of the documents.
        lengths: tokens of each document, [D].
        sequence_tokens: tokens of each sequence, [S].
    """

    ids: Int64s
    positions: Int64s
    target_positions: Int64s
    targets: Int64s
    documents: Int64s
    labels: Int64s
    lengths: list[int]
    sequence_tokens: list[int]


def collate_segments(segments: Segments) -> CollatedBatch:
    """Collate the sequences that these segments make, by numpy."""
    ids = np.concatenate(segments.views, dtype=np.int64)
    starts = np.cumsum(segments.sizes) - segments.sizes
    counts = segments.run_stops - segments.run_starts
    target_positions = ranges(starts[segments.run_segments] + segments.run_starts - 1, counts)
    sequence_tokens = np.bincount(segments.sequences, segments.sizes).astype(np.int64)
    return CollatedBatch(
        ids[None],
        ranges(np.zeros_like(starts), segments.sizes)[None],
        target_positions,
        ids[target_positions + 1],
        segments.documents,
        segments.labels,
        segments.sizes.tolist(),
        sequence_tokens.tolist(),
    )


def build_native_collator(stores: list[Store], sequence_length: int) -> NativeCollator | None:
    """Build the compiled collator; None if there is no compiler.

    Args:
        stores: of all sources, whose sequences are numbered one store after the other.
        sequence_length: the most tokens that a sequence has.
    """
    loops = _load_library()
    return NativeCollator(loops, stores, sequence_length) if loops else None


@cache
def _load_library() -> CDLL | None:
    loops, _ = load_library(Path(__file__).with_name("collate.cpp"))
    if loops:
        pointer, number = c_void_p, c_int64
        loops.gather.argtypes = [pointer, number, pointer, number, pointer, number, pointer]
        loops.gather.restype = c_int64
    return loops


class NativeCollator:
    """Collates by compiled code; keeps the last OPEN_SHARDS shards that it opened mapped."""

    def __init__(self, loops: CDLL, stores: list[Store], sequence_length: int) -> None:
        self._gather, self._stores, self._sequence_length = loops.gather, stores, sequence_length
        self._shards = [np.zeros((len(store.shards), len(SHARD)), np.int64) for store in stores]
        self._open: deque[tuple[int, int, ShardColumns]] = deque()
        first_sequences = np.cumsum([0, *(store.sequences for store in stores)]).tolist()
        first_documents = np.cumsum([0, *(store.documents for store in stores)]).tolist()
        self._sources = np.array(
            [
                (
                    sequence, document, _address(store.sequence_offsets),
                    _address(store.segments), len(store.segments),
                    _address(store.shards), _address(shards), len(shards),
                )
                for sequence, document, store, shards in zip(
                    first_sequences, first_documents, stores, self._shards, strict=False
                )
            ]
        )  # fmt: skip
        self._source_arguments = _address(self._sources), len(stores)

    def __call__(self, sequences: Int64s) -> CollatedBatch:
        """Collate the sequences with these numbers, int64 [S].

        Raises:
            UserError: a store is damaged.
        """
        room = len(sequences) * self._sequence_length
        # One block: memory is allocated once for each micro-batch, not seven times.
        block = np.empty((7, room), np.int64)
        state = np.zeros(len(STATE) + len(sequences), np.int64)
        sequences = np.ascontiguousarray(sequences)
        results = _address(block), room, _address(state)
        arguments = *self._source_arguments, _address(sequences), len(sequences), *results
        while (status := self._gather(*arguments)) == CLOSED:
            self._open_shard(*state[5:7].tolist())
        tokens, targets, documents, _, _, source, _, *sequence_tokens = state.tolist()
        if status != DONE:
            message = "offsets and sizes of its arrays do not match"
            raise damaged_store(self._stores[source].folder, message)
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
            *(_address(columns.tokens), _address(columns.token_offsets)),
            *(_address(columns.target_runs), _address(columns.run_offsets)),
            _address(columns.label),
            *(columns.tokens.size, columns.target_runs.size, columns.file_index.size),
        )


def _address(array: NDArray[Any]) -> int:
    """Memory address of a contiguous array."""
    return int(array.ctypes.data)
