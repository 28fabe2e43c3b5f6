"""Prepare the sources of a stage: read, render, tokenize, pack and store, once per fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dtrain.config.data import Data, Source
from dtrain.config.objectives import format_mismatch
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.core.hashes import fingerprint
from dtrain.core.locks import FolderLock
from dtrain.core.log import Meter, progress, say
from dtrain.data.chat_templates import resolve_template
from dtrain.data.packed_dataset import PackedDataset, PreparedSource
from dtrain.data.packing import Packing
from dtrain.data.records import (
    Record,
    detect_source_format,
    files_of_format,
    read_records,
)
from dtrain.data.sampling import build_sampling_plan
from dtrain.data.shards import (
    BOUNDARIES_FILE,
    ShardBoundaries,
    ShardBuilder,
    WorkShare,
    find_boundaries,
    load_boundaries,
    save_boundaries,
)
from dtrain.data.sources import find_source_files
from dtrain.data.store import MANIFEST, Store
from dtrain.data.store_writer import StoreWriter
from dtrain.data.tokenize import RowEncoder, check_tokenizer

CODE_VERSION = 10  # raise it whenever the same input gives another store or manifest


@dataclass(frozen=True)
class DatasetSpec:
    """How an objective's rows become sequences.

    Attributes:
        objective: its kind in a recipe, for messages and a store's identity.
        encoder: turns rows into documents.
        packing: how documents share sequences.
    """

    objective: str
    encoder: type[RowEncoder]
    packing: Packing


def prepare(
    data: Data,
    spec: DatasetSpec,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_fingerprint: str,
    cache: Path,
    processes: int | None = None,
    global_batch: int = 1,
) -> PackedDataset:
    """Open the prepared data of a stage, after preparing what is missing.

    Each source has a store of its own, `cache/<fingerprint>`, so a changed weight or an added
    source costs nothing for the others. After an interruption, the next call continues; while
    another process prepares a source, this one waits for it and says so.

    Args:
        data: group of the recipe.
        spec: how rows become sequences.
        tokenizer: of the base model.
        tokenizer_fingerprint: of everything that shapes its token ids.
        cache: folder for prepared data.
        processes: that tokenize; None for as many as cores and memory allow. Their number does not
            change the stores.
        global_batch: sequences of a step, for weights that change after some steps.

    Raises:
        UserError: a source, a row or the tokenizer cannot be used.
    """
    check_tokenizer(tokenizer, needs_end_token=spec.encoder.needs_end_token)
    names = [source.path for source in data.all_sources]
    weights = {steps * global_batch: values for steps, values in data.weights_by_step.items()}
    replay = data.replay.ratio if data.replay else None
    build_sampling_plan([1] * len(names), weights, names, replay)  # fails before the work
    preparations = [
        SourcePreparation(data, source, spec, tokenizer, tokenizer_fingerprint, cache)
        for source in data.all_sources
    ]
    prepared = [preparation.run(processes) for preparation in preparations]
    sequences = [source.store.sequences for source in prepared]
    sampling = build_sampling_plan(sequences, weights, names, replay)
    return PackedDataset(prepared, sampling, data.sequence_length)


def prepare_share(
    data: Data,
    spec: DatasetSpec,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_fingerprint: str,
    cache: Path,
    share: WorkShare,
    processes: int | None = None,
) -> bool:
    """Do one share of `prepare`, while other processes or nodes with this `cache` do the rest.

    Returns:
        Whether all data is ready; if not, others are still working, and the last of them (or the
        next `prepare`) finishes.

    Raises:
        UserError: as `prepare`.
    """
    check_tokenizer(tokenizer, needs_end_token=spec.encoder.needs_end_token)
    preparations = [
        SourcePreparation(data, source, spec, tokenizer, tokenizer_fingerprint, cache)
        for source in data.all_sources
    ]
    for preparation in preparations:
        preparation.run_share(share, processes)
    return all(preparation.is_ready() for preparation in preparations)


class SourcePreparation:
    """The preparation of one source."""

    def __init__(
        self,
        data: Data,
        source: Source,
        spec: DatasetSpec,
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_fingerprint: str,
        cache: Path,
    ) -> None:
        self.data, self.source, self.spec = data, source, spec
        files = find_source_files(source, cache)
        auto = source.format == "auto"
        self.row_format = detect_source_format(files, source.columns) if auto else source.format
        self.source_files = files = files_of_format(files, self.row_format)
        if mismatch := format_mismatch(spec.objective, self.row_format):
            where = f"{source.path}: format: {self.row_format} with kind: {spec.objective}"
            raise UserError(mismatch[0], where=where, fix=mismatch[1])
        is_text = self.row_format == "text"
        self.template = None if is_text else resolve_template(data.template, tokenizer)
        self.encoder = spec.encoder(
            tokenizer,
            self.template,
            data.sequence_length,
            data.overlong,
            files,
            data.train_on,
            data.split_special_tokens,
        )
        self.fingerprint = fingerprint(self._identity(tokenizer_fingerprint))
        self.folder = cache / self.fingerprint

    def _identity(self, tokenizer_fingerprint: str) -> dict[str, Any]:
        """Everything that shapes the store; paths do not."""
        return {
            "code": CODE_VERSION,
            "content": [[file.kind, file.identity] for file in self.source_files],
            "format": self.row_format,
            "columns": dict(self.source.columns),
            "kind": self.spec.objective,
            "template": self.template.source if self.template else None,
            "tokenizer": tokenizer_fingerprint,
            "sequence_length": self.data.sequence_length,
            "packing": self.data.packing,
            "split_special_tokens": self.data.split_special_tokens,
            **{key: getattr(self.data, key) for key in self.encoder.settings},
        }

    def run(self, processes: int | None) -> PreparedSource:
        """Open the store, after building it or waiting for the process that builds it."""
        if not self.is_ready():
            with _locked(self.folder, self.source.path):
                if not self.is_ready():
                    shards = self._shard_builder()
                    self._build_shards(shards, WorkShare(), processes)
                    self._finish(shards)
        return PreparedSource(self.source.path, self.source_files, Store(self.folder))

    def run_share(self, share: WorkShare, processes: int | None) -> None:
        """Build shards while others do the same; the last one finishes the store."""
        if self.is_ready():
            return
        with _locked(self.folder, self.source.path):
            shards = None if self.is_ready() else self._shard_builder()
        if shards is None:
            return
        self._build_shards(shards, share, processes)
        if not shards.missing():
            with _locked(self.folder, self.source.path):
                if not self.is_ready():
                    self._finish(shards)

    def is_ready(self) -> bool:
        """Whether the store is complete."""
        return (self.folder / MANIFEST).exists()

    def _shard_builder(self) -> ShardBuilder:
        boundaries = load_boundaries(self.folder)
        if boundaries is None:
            for shard in self.folder.glob("shard-*"):  # of other boundaries
                shard.unlink()
            boundaries = self._find_boundaries()
            self._check_unchanged()
            save_boundaries(self.folder, boundaries)
        return ShardBuilder(
            self.folder,
            boundaries,
            self.source_files,
            self.row_format,
            self.source.columns,
            self.encoder,
        )

    def _find_boundaries(self) -> ShardBoundaries:
        """Read all rows once, so that a bad row is reported before hours of work on the others."""
        with progress(f"reading {self.source.path}", len(self.source_files)) as meter:
            boundaries = find_boundaries(self._read(meter))
        if len(boundaries) == 1:
            message = "the source has no rows"
            raise EmptyDataError(message, where=self.source.path, fix="correct `path`")
        return boundaries

    def _read(self, meter: Meter) -> Iterator[Record]:
        for record in read_records(self.source_files, self.row_format, self.source.columns):
            meter.advance(record.file_index - meter.done)
            yield record

    def _build_shards(self, shards: ShardBuilder, share: WorkShare, processes: int | None) -> None:
        if finished := len(shards) - len(shards.missing()):
            say(f"{self.source.path}: {finished:,} of {len(shards):,} shards exist, continuing")
        shards.build(f"tokenizing {self.source.path}", share, processes)

    def _check_unchanged(self) -> None:
        for file in self.source_files:
            file.check_unchanged(again=True)

    def _finish(self, shards: ShardBuilder) -> None:
        self._check_unchanged()
        StoreWriter(self.folder, len(shards)).finish(
            packing=self.spec.packing,
            packed=self.data.packing,
            sequence_length=self.data.sequence_length,
            extra={"fingerprint": self.fingerprint, "code_version": CODE_VERSION},
            where=self.source.path,
        )
        (self.folder / BOUNDARIES_FILE).unlink()
        for temporary in self.folder.glob(".shard-*"):  # of killed processes
            temporary.unlink()


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock on a store; say so if that means to wait."""
    lock = FolderLock(folder)
    if not lock.acquire():
        say(f"{name}: waiting for {lock.holder()}, which prepares the same data")
        lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
