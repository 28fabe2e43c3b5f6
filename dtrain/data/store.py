"""The store of one source: tokens in Arrow shards, a plan of rows, one manifest written last.

    shard-00000.arrow …   tokens, runs of supervised tokens, provenance of each document
    pieces.npy rows.npy   which pieces make which row (packing.Plan)
    row_tokens.npy row_supervised.npy row_examples.npy   counts of each row
    shards.npy            first document and bytes of each shard
    B3SUMS                of all of these, as `b3sum --check` reads it
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
from dtrain.core.hashes import file_hash
from dtrain.data.packing import Segments, ranges

MANIFEST, SUMS = "store.json", "B3SUMS"
PLAN_FILES = (
    "pieces.npy", "rows.npy", "sequence_tokens.npy", "sequence_targets.npy",
    "sequence_examples.npy", "shards.npy",
)  # fmt: skip
TOTALS = ("rows", "documents", "tokens", "supervised_tokens", "longest_segment", "largest_token")
KEYS = {*TOTALS, "counts", "fingerprint", "files"}  # of the manifest, that readers count on
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
        label: what the objective makes of a document, such as 1 for a chosen answer, [documents].
    """

    tokens: Int32s
    token_offsets: Int64s
    runs: Int32s
    run_offsets: Int64s
    part: Int32s
    number: Int64s
    label: Int32s
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
        raise damaged(path, str(error)) from error
    tokens, runs = batch["tokens"], batch["runs"]
    return Columns(
        tokens.values.to_numpy(),
        tokens.offsets.to_numpy(),
        runs.values.to_numpy(),
        runs.offsets.to_numpy(),
        batch["part"].to_numpy(),
        batch["number"].to_numpy(),
        batch["label"].to_numpy(),
        metadata,
    )


@dataclass(frozen=True)
class StoredSequence:
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
            UserError: the manifest was changed, or is of another version of dtrain; a file of the
                plan is missing or has another size than it was written with.
        """
        self.folder = folder
        self.manifest = _manifest(folder / MANIFEST)
        for name, entry in self.manifest["files"].items():
            self._check_size(name, entry["bytes"])
        arrays = [_array(folder / name) for name in PLAN_FILES]
        self.pieces, self.sequence_offsets, self.sequence_tokens, self.sequence_targets = arrays[:4]
        self.sequence_examples, self.shards = arrays[4:]
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self.map_shard)

    @property
    def rows(self) -> int:
        """Rows of the store."""
        return int(self.manifest["rows"])

    @property
    def documents(self) -> int:
        """Documents of the store; some may be in no row."""
        return int(self.manifest["documents"])

    def row(self, number: int) -> StoredSequence:
        """Read one row, 0 … rows - 1."""
        pieces = self.gather(np.array([number]))
        lengths = pieces.sizes.astype(np.int32)
        supervised = np.zeros(int(lengths.sum()), dtype=bool)
        first = (np.cumsum(lengths) - lengths)[pieces.run_pieces] + pieces.run_starts
        supervised[ranges(first, pieces.run_stops - pieces.run_starts)] = True
        parts, numbers = self._provenance(number)
        return StoredSequence(np.concatenate(pieces.views), supervised, lengths, parts, numbers)

    def gather(self, numbers: Int64s) -> Segments:
        """What these rows [n] are made of; their tokens are read where they are used."""
        first = self.sequence_offsets[numbers]
        counts = self.sequence_offsets[numbers + 1] - first
        pieces = self.pieces[ranges(first, counts)]
        rows = np.repeat(np.arange(len(numbers)), counts)
        shards = self._shards_of(pieces["document"])
        views, runs = [_NO_TOKENS] * rows.size, [_NO_RUNS]
        labels = np.empty(rows.size, dtype=np.int64)
        by_shard = np.argsort(shards, kind="stable")
        edges = np.flatnonzero(np.diff(shards[by_shard])) + 1
        for here in np.split(by_shard, edges) if rows.size else []:
            columns, inside = self._inside(int(shards[here[0]]), pieces["document"][here])
            begins = columns.token_offsets[inside] + pieces["start"][here]
            ends = begins + pieces["tokens"][here]
            tokens, places = columns.tokens, (here.tolist(), begins.tolist(), ends.tolist())
            for place, begin, end in zip(*places, strict=True):
                views[place] = tokens[begin:end]
            runs.append(_runs(columns, inside, here))
            labels[here] = columns.label[inside]
        sizes = pieces["tokens"].astype(np.int64)
        documents = pieces["document"].astype(np.int64)
        clipped = _clipped(np.concatenate(runs), pieces)
        return Segments(views, sizes, rows, documents, labels, *clipped)

    def _shards_of(self, documents: Int64s) -> Int64s:
        found: Int64s = self.shards["first_document"].searchsorted(documents, side="right") - 1
        return found

    def _inside(self, shard: int, documents: Int64s) -> tuple[Columns, Int64s]:
        return self._shard(shard), documents - self.shards["first_document"][shard]

    def _provenance(self, row: int) -> tuple[list[int], list[int]]:
        parts, numbers = [], []
        documents = self.pieces["document"][slice(*self.sequence_offsets[row : row + 2])]
        for document, shard in zip(documents, self._shards_of(documents).tolist(), strict=True):
            columns, inside = self._inside(shard, document)
            parts.append(int(columns.part[inside]))
            numbers.append(int(columns.number[inside]))
        return parts, numbers

    def verify(self) -> None:
        """Read everything and compare it with the hashes it was written with.

        Raises:
            UserError: naming the first file that differs.
        """
        for name, entry in self.manifest["files"].items():
            self._check_hash(name, entry["blake3"])
        for line in (self.folder / SUMS).read_text(encoding="utf-8").splitlines():
            digest, name = line.split(maxsplit=1)
            self._check_hash(name, digest)

    def map_shard(self, shard: int) -> Columns:
        """Map a shard, anew at each call.

        Raises:
            UserError: it is missing or damaged.
        """
        name = shard_name(shard)
        self._check_size(name, int(self.shards["bytes"][shard]))
        return map_shard(self.folder / name)

    def _check_size(self, name: str, size: int) -> None:
        path = self.folder / name
        if not path.is_file():
            raise damaged(path, "it is missing")
        if path.stat().st_size != size:
            raise damaged(path, f"{path.stat().st_size} bytes instead of {size}")

    def _check_hash(self, name: str, digest: str) -> None:
        path = self.folder / name
        if not path.is_file() or file_hash(path) != digest:
            raise damaged(path, "its content is not what was written")


def _array(path: Path) -> NDArray[Any]:
    try:  # a plain view: each access to numpy's own memmap class costs microseconds
        found: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # numpy's reader of the head raises what its parsers raise
        raise damaged(path, str(error)) from error
    return found


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = read_sealed(path)
    except UserError as error:
        raise damaged(path, error.message) from error
    if missing := sorted(KEYS - found.keys()):
        raise damaged(
            path, f"it has no {', '.join(missing)}, as another version of dtrain wrote it"
        )
    return found


_NO_TOKENS = np.empty(0, dtype=np.int32)
_NO_RUNS = np.empty((0, 3), dtype=np.int64)


def _runs(columns: Columns, inside: Int64s, pieces: Int64s) -> Int64s:
    """[R, 3] piece, start and stop of the runs of these documents of a shard."""
    first = columns.run_offsets[inside]
    counts = (columns.run_offsets[inside + 1] - first) // 2
    chosen = columns.runs.reshape(-1, 2)[ranges(first // 2, counts)]
    return np.column_stack([np.repeat(pieces, counts), chosen])


def _clipped(runs: Int64s, pieces: NDArray[np.void]) -> tuple[Int64s, Int64s, Int64s]:
    """Runs in the order of the pieces, as far as they lie in them; the first token is in none."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    piece = runs[:, 0]
    starts = np.maximum(runs[:, 1] - pieces["start"][piece], 1)
    stops = np.minimum(runs[:, 2] - pieces["start"][piece], pieces["tokens"][piece])
    keep = starts < stops
    return piece[keep], starts[keep], stops[keep]


def damaged(path: Path, what: str) -> UserError:
    """What to say of a store, or of a file in it, that is not what was written."""
    folder = path if path.is_dir() else path.parent
    return UserError(
        f"the prepared data is damaged: {what}",
        where=str(path),
        fix=f"delete the folder {folder}; the data is then prepared again",
    )
