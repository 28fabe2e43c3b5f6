"""The store of one source: tokens in Arrow shards, a plan of rows, one manifest written last.

    shard-00000.arrow …   tokens, runs of supervised tokens, provenance of each document
    pieces.npy rows.npy   which pieces make which row (packing.Plan)
    row_tokens.npy row_supervised.npy   counts of each row
    shards.npy            first document and bytes of each shard
    SHA256SUMS            of all of these, as `sha256sum -c` reads it
    store.json            totals, the hashes of the plan and of itself: without it there is no store

Everything is memory-mapped where it is used, so opening costs the same at any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtrain.core.errors import UserError
from dtrain.core.files import read_sealed
from dtrain.core.hashes import file_sha256

MANIFEST, SUMS = "store.json", "SHA256SUMS"
PLAN_FILES = ("pieces.npy", "rows.npy", "row_tokens.npy", "row_supervised.npy", "shards.npy")
SHARD = np.dtype([("first_document", "<i8"), ("bytes", "<i8")])
OPEN_SHARDS = 512  # a kernel maps 65,530 files at most

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """A shard's columns as views of the mapped file; document d is values[offsets[d]:offsets[d+1]].

    Attributes:
        tokens, token_offsets: [tokens], [documents + 1].
        runs, run_offsets: starts and stops of supervised runs, [2 runs], [documents + 1].
        part, number: provenance, [documents].
    """

    tokens: Int32s
    token_offsets: Int64s
    runs: Int32s
    run_offsets: Int64s
    part: Int32s
    number: Int64s
    metadata: dict[bytes, bytes]


def shard_name(number: int) -> str:
    """0 → 'shard-00000.arrow'"""
    return f"shard-{number:05d}.arrow"


def map_shard(path: Path) -> Columns:
    """Map one shard.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            batch, metadata = reader.get_batch(0), reader.schema.metadata
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, str(error)) from error
    tokens, runs = batch["tokens"], batch["runs"]
    return Columns(
        tokens.values.to_numpy(),
        tokens.offsets.to_numpy(),
        runs.values.to_numpy(),
        runs.offsets.to_numpy(),
        batch["part"].to_numpy(),
        batch["number"].to_numpy(),
        metadata,
    )


@dataclass(frozen=True)
class RowData:
    """One row of a store.

    Attributes:
        tokens: int32 [n].
        supervised: bool [n], whether the token is a target; never at the start of a document.
        lengths: int32 [documents], sum n.
        parts, numbers: provenance of each document.
    """

    tokens: Int32s
    supervised: NDArray[np.bool_]
    lengths: Int32s
    parts: list[int]
    numbers: list[int]


class Store:
    """A complete store, opened for reading."""

    def __init__(self, folder: Path) -> None:
        """Open the store in `folder`.

        Raises:
            UserError: the manifest was changed; a file of the plan is missing or has another size
                than it was written with.
        """
        self.folder = folder
        self.manifest = _manifest(folder / MANIFEST)
        for name, entry in self.manifest["files"].items():
            self._check_size(name, entry["bytes"])
        arrays = [_array(folder / name) for name in PLAN_FILES]
        self.pieces, self.row_offsets, self.row_tokens, self.row_supervised, self.shards = arrays
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._map)

    @property
    def rows(self) -> int:
        """Rows of the store."""
        return int(self.manifest["rows"])

    def row(self, number: int) -> RowData:
        """Read one row, 0 … rows - 1."""
        first, stop = self.row_offsets[number : number + 2].tolist()
        pieces = self.pieces[first:stop]
        length = int(self.row_tokens[number])
        tokens, supervised = np.empty(length, np.int32), np.zeros(length, bool)
        parts, numbers, place = [], [], 0
        for document, start, size in pieces.tolist():
            columns, index = self._document(document)
            begin = int(columns.token_offsets[index]) + start
            tokens[place : place + size] = columns.tokens[begin : begin + size]
            for run_start, run_stop in _runs(columns, index):
                low, high = max(run_start - start, 1), min(run_stop - start, size)
                if low < high:
                    supervised[place + low : place + high] = True
            parts.append(int(columns.part[index]))
            numbers.append(int(columns.number[index]))
            place += size
        return RowData(tokens, supervised, pieces["tokens"].copy(), parts, numbers)

    def verify(self) -> None:
        """Read everything and compare it with the hashes it was written with.

        Raises:
            UserError: naming the first file that differs.
        """
        for name, entry in self.manifest["files"].items():
            self._check_hash(name, entry["sha256"])
        for line in (self.folder / SUMS).read_text(encoding="utf-8").splitlines():
            digest, name = line.split(maxsplit=1)
            self._check_hash(name, digest)

    def _document(self, document: int) -> tuple[Columns, int]:
        shard = int(np.searchsorted(self.shards["first_document"], document, side="right")) - 1
        return self._shard(shard), document - int(self.shards["first_document"][shard])

    def _map(self, shard: int) -> Columns:
        name = shard_name(shard)
        self._check_size(name, int(self.shards["bytes"][shard]))
        return map_shard(self.folder / name)

    def _check_size(self, name: str, size: int) -> None:
        path = self.folder / name
        if not path.is_file():
            raise _damaged(path, "it is missing")
        if path.stat().st_size != size:
            raise _damaged(path, f"{path.stat().st_size} bytes instead of {size}")

    def _check_hash(self, name: str, digest: str) -> None:
        path = self.folder / name
        if not path.is_file() or file_sha256(path) != digest:
            raise _damaged(path, "its content is not what was written")


def _array(path: Path) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's reader of the head raises what its parsers raise
        raise _damaged(path, str(error)) from error
    return found


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except UserError as error:
        raise _damaged(path, error.what) from error


def _runs(columns: Columns, index: int) -> list[list[int]]:
    start, stop = columns.run_offsets[index], columns.run_offsets[index + 1]
    runs: list[list[int]] = columns.runs[start:stop].reshape(-1, 2).tolist()
    return runs


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"the prepared data is damaged: {what}",
        where=str(path),
        fix=f"delete the folder {path.parent}; the data is then prepared again",
    )
