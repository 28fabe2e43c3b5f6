"""The store of one source: tokens in Arrow shards, a packing plan, and a manifest written last.

    shard-00000.arrow …            tokens, runs of target tokens, provenance, label of each document
    segments.npy sequences.npy     which segments make which sequence (`packing.PackingPlan`)
    sequence_tokens.npy sequence_targets.npy sequence_examples.npy    counts of each sequence
    shards.npy                     first document and bytes of each shard
    B3SUMS                         hashes of all of these, as `b3sum --check` reads them
    store.json                     totals, hashes of the plan and of itself; without it the store
                                   does not exist

All files are memory-mapped on use, so opening a store takes the same time at any size.
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
from dtrain.core.process_limits import too_many_files
from dtrain.data.packing import Segments, ranges

MANIFEST, SUMS = "store.json", "B3SUMS"
PLAN_FILES = (
    "segments.npy", "sequences.npy", "sequence_tokens.npy", "sequence_targets.npy",
    "sequence_examples.npy", "shards.npy",
)  # fmt: skip
TOTALS = (
    "sequences", "documents", "tokens", "supervised_tokens", "longest_segment", "largest_token",
)  # fmt: skip
KEYS = {*TOTALS, "counts", "fingerprint", "files"}  # of the manifest, that readers rely on
SHARD = np.dtype([("first_document", "<i8"), ("bytes", "<i8")])
OPEN_SHARDS = 512  # a kernel maps 65,530 files at most

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class ShardColumns:
    """A shard's columns as views of the mapped file.

    A list column has document d at values[offsets[d]:offsets[d + 1]].

    Attributes:
        tokens, token_offsets: [tokens], [documents + 1].
        target_runs, run_offsets: starts and stops of runs of targets, [2 runs], [documents + 1].
        file_index, row_number: provenance, [documents].
        label: of each document, as its row encoder set it, [documents].
    """

    tokens: Int32s
    token_offsets: Int64s
    target_runs: Int32s
    run_offsets: Int64s
    file_index: Int32s
    row_number: Int64s
    label: Int32s
    metadata: dict[bytes, bytes]


def shard_name(index: int) -> str:
    """0 → 'shard-00000.arrow'"""
    return f"shard-{index:05d}.arrow"


def map_shard(path: Path) -> ShardColumns:
    """Map a shard.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            batch, metadata = reader.get_batch(0), reader.schema.metadata
    except (OSError, pa.ArrowException) as error:
        if limit := too_many_files(error):
            raise limit from error
        raise damaged_store(path, str(error)) from error
    tokens, runs = batch["tokens"], batch["target_runs"]
    return ShardColumns(
        tokens.values.to_numpy(),
        tokens.offsets.to_numpy(),
        runs.values.to_numpy(),
        runs.offsets.to_numpy(),
        batch["file_index"].to_numpy(),
        batch["row_number"].to_numpy(),
        batch["label"].to_numpy(),
        metadata,
    )


@dataclass(frozen=True)
class StoredSequence:
    """A sequence of a store.

    Attributes:
        tokens: int32 [n].
        is_target: bool [n]; false at the start of each document.
        lengths: int32 [documents], sum n.
        file_indices, row_numbers: provenance of each document.
    """

    tokens: Int32s
    is_target: NDArray[np.bool_]
    lengths: Int32s
    file_indices: list[int]
    row_numbers: list[int]


class Store:
    """A complete store, open for reading."""

    def __init__(self, folder: Path) -> None:
        """Open the store in `folder`.

        Raises:
            UserError: the manifest was changed or is of another version of dtrain; a file of the
                plan is missing or has another size than when it was written.
        """
        self.folder = folder
        self.manifest = _read_manifest(folder / MANIFEST)
        for name, entry in self.manifest["files"].items():
            self._check_size(name, entry["bytes"])
        arrays = [_map_array(folder / name) for name in PLAN_FILES]
        self.segments, self.sequence_offsets, self.sequence_tokens = arrays[:3]
        self.sequence_targets, self.sequence_examples, self.shards = arrays[3:]
        self._open_shard = lru_cache(maxsize=OPEN_SHARDS)(self.map_shard)

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self.manifest["sequences"])

    @property
    def documents(self) -> int:
        """Number of documents; some may be in no sequence."""
        return int(self.manifest["documents"])

    def sequence(self, index: int) -> StoredSequence:
        """Read one sequence, 0 … sequences - 1."""
        segments = self.gather(np.array([index]))
        lengths = segments.sizes.astype(np.int32)
        is_target = np.zeros(int(lengths.sum()), dtype=bool)
        starts = (np.cumsum(lengths) - lengths)[segments.run_segments] + segments.run_starts
        is_target[ranges(starts, segments.run_stops - segments.run_starts)] = True
        files, rows = self._provenance(index)
        return StoredSequence(np.concatenate(segments.views), is_target, lengths, files, rows)

    def gather(self, indices: Int64s) -> Segments:
        """Return the segments of these sequences [n]; their tokens are read on use."""
        first = self.sequence_offsets[indices]
        counts = self.sequence_offsets[indices + 1] - first
        segments = self.segments[ranges(first, counts)]
        sequences = np.repeat(np.arange(len(indices)), counts)
        shards = self._shards_of(segments["document"])
        views, runs = [_NO_TOKENS] * sequences.size, [_NO_RUNS]
        labels = np.empty(sequences.size, dtype=np.int64)
        by_shard = np.argsort(shards, kind="stable")
        edges = np.flatnonzero(np.diff(shards[by_shard])) + 1
        for here in np.split(by_shard, edges) if sequences.size else []:
            columns, inside = self._inside(int(shards[here[0]]), segments["document"][here])
            begins = columns.token_offsets[inside] + segments["start"][here]
            ends = begins + segments["tokens"][here]
            tokens, bounds = columns.tokens, (here.tolist(), begins.tolist(), ends.tolist())
            for index, begin, end in zip(*bounds, strict=True):
                views[index] = tokens[begin:end]
            runs.append(_target_runs(columns, inside, here))
            labels[here] = columns.label[inside]
        sizes = segments["tokens"].astype(np.int64)
        documents = segments["document"].astype(np.int64)
        clipped = _clip_runs(np.concatenate(runs), segments)
        return Segments(views, sizes, sequences, documents, labels, *clipped)

    def _shards_of(self, documents: Int64s) -> Int64s:
        shards: Int64s = self.shards["first_document"].searchsorted(documents, side="right") - 1
        return shards

    def _inside(self, shard: int, documents: Int64s) -> tuple[ShardColumns, Int64s]:
        return self._open_shard(shard), documents - self.shards["first_document"][shard]

    def _provenance(self, index: int) -> tuple[list[int], list[int]]:
        files, rows = [], []
        documents = self.segments["document"][slice(*self.sequence_offsets[index : index + 2])]
        for document, shard in zip(documents, self._shards_of(documents).tolist(), strict=True):
            columns, inside = self._inside(shard, document)
            files.append(int(columns.file_index[inside]))
            rows.append(int(columns.row_number[inside]))
        return files, rows

    def verify(self) -> None:
        """Read everything and compare it with the hashes from when it was written.

        Raises:
            UserError: naming the first file that differs.
        """
        for name, entry in self.manifest["files"].items():
            self._check_hash(name, entry["blake3"])
        for line in (self.folder / SUMS).read_text(encoding="utf-8").split("\n")[:-1]:
            digest, name = line.split(maxsplit=1)
            self._check_hash(name, digest)

    def map_shard(self, shard: int) -> ShardColumns:
        """Map a shard; each call makes a new mapping.

        Raises:
            UserError: it is missing or damaged.
        """
        name = shard_name(shard)
        self._check_size(name, int(self.shards["bytes"][shard]))
        return map_shard(self.folder / name)

    def _check_size(self, name: str, size: int) -> None:
        path = self.folder / name
        if not path.is_file():
            raise damaged_store(path, "it is missing")
        if path.stat().st_size != size:
            raise damaged_store(path, f"{path.stat().st_size} bytes instead of {size}")

    def _check_hash(self, name: str, digest: str) -> None:
        path = self.folder / name
        if not path.is_file() or file_hash(path) != digest:
            raise damaged_store(path, "its content is not what was written")


def _map_array(path: Path) -> NDArray[Any]:
    try:  # a plain view: each access to numpy's own memmap class costs microseconds
        array: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # numpy's header parser raises all sorts of exceptions
        if limit := too_many_files(error):
            raise limit from error
        raise damaged_store(path, str(error)) from error
    return array


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_sealed(path)
    except UserError as error:
        raise damaged_store(path, error.message) from error
    if missing := sorted(KEYS - manifest.keys()):
        message = f"it has no {', '.join(missing)}, as another version of dtrain wrote it"
        raise damaged_store(path, message)
    return manifest


_NO_TOKENS = np.empty(0, dtype=np.int32)
_NO_RUNS = np.empty((0, 3), dtype=np.int64)


def _target_runs(columns: ShardColumns, inside: Int64s, segments: Int64s) -> Int64s:
    """[R, 3]: segment, start and stop of the runs of these documents of a shard."""
    first = columns.run_offsets[inside]
    counts = (columns.run_offsets[inside + 1] - first) // 2
    chosen = columns.target_runs.reshape(-1, 2)[ranges(first // 2, counts)]
    return np.column_stack([np.repeat(segments, counts), chosen])


def _clip_runs(runs: Int64s, segments: NDArray[np.void]) -> tuple[Int64s, Int64s, Int64s]:
    """Clip runs to their segments, without the first token, in the order of the segments."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    segment = runs[:, 0]
    starts = np.maximum(runs[:, 1] - segments["start"][segment], 1)
    stops = np.minimum(runs[:, 2] - segments["start"][segment], segments["tokens"][segment])
    keep = starts < stops
    return segment[keep], starts[keep], stops[keep]


def damaged_store(path: Path, message: str) -> UserError:
    """An error for a store, or a file in it, whose content is not what was written."""
    folder = path if path.is_dir() else path.parent
    return UserError(
        f"the prepared data is damaged: {message}",
        where=str(path),
        fix=f"delete the folder {folder}; the data is then prepared again",
    )
