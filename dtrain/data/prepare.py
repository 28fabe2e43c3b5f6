"""Sources into a mixture: read, render, tokenise, pack and store, once for each fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dtrain.config.objectives import format_mismatch
from dtrain.config.schema import Data, Source
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.core.hashes import fingerprint
from dtrain.core.locks import FolderLock
from dtrain.core.log import Meter, progress, say
from dtrain.data.chat_templates import resolve_template
from dtrain.data.packed_dataset import (
    PackedDataset,
    PackedSequence,
    PreparedSource,
    check_vocabulary,
)
from dtrain.data.packing import Packing
from dtrain.data.records import Record, detect_source_format, read_records
from dtrain.data.sampling import mix
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

__all__ = ["PackedDataset", "PackedSequence", "check_vocabulary", "prepare"]

CODE_VERSION = 8  # raise it whenever the same input would give another store or manifest


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
    """Open the prepared data of a stage; prepare first what is not there yet.

    Each source has a store of its own, `cache/<fingerprint>`, so that a changed weight or an
    added source costs nothing for the others. Interrupted, the next call goes on; while another
    process works on a source, this one waits and says so.

    Args:
        data: group of the recipe.
        spec: how rows become sequences.
        tokenizer: of the base model.
        tokenizer_fingerprint: of everything that shapes its token ids.
        cache: folder for prepared data.
        processes: that tokenise; None for as many as cores and memory allow. The stores they make
            do not depend on it.
        global_batch: sequences of a step, where weights change at steps.

    Raises:
        UserError: a source, a row or the tokenizer cannot be used.
    """
    check_tokenizer(tokenizer, needs_end_token=spec.encoder.needs_end_token)
    names = [source.path for source in data.all_sources]
    weights = {steps * global_batch: given for steps, given in data.weights_by_step.items()}
    replay = data.replay.ratio if data.replay else None
    mix([1] * len(names), weights, names, replay)  # fails at once
    prepared = [
        _Preparation(data, source, spec, tokenizer, tokenizer_fingerprint, cache).run(processes)
        for source in data.all_sources
    ]
    shares = mix([source.store.rows for source in prepared], weights, names, replay)
    return PackedDataset(prepared, shares, data.sequence_length)


def prepare_share(
    data: Data,
    spec: DatasetSpec,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_fingerprint: str,
    cache: Path,
    share: WorkShare,
    processes: int | None = None,
) -> bool:
    """Do one share of `prepare`, beside others on this node or others that share `cache`.

    Returns:
        Whether all is ready; if not, others still work on what is left, and the last of them (or
        the next `prepare`) finishes.

    Raises:
        UserError: as `prepare`.
    """
    check_tokenizer(tokenizer, needs_end_token=spec.encoder.needs_end_token)
    own = [
        _Preparation(data, source, spec, tokenizer, tokenizer_fingerprint, cache)
        for source in data.all_sources
    ]
    for preparation in own:
        preparation.run_share(share, processes)
    return all(preparation.is_ready() for preparation in own)  # others may have ended meanwhile


class _Preparation:
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
        self.parts = find_source_files(source, cache)
        self.form = (
            source.format
            if source.format != "auto"
            else detect_source_format(self.parts, source.columns)
        )
        if mismatch := format_mismatch(spec.objective, self.form):
            where = f"{source.path}: format: {self.form} with kind: {spec.objective}"
            raise UserError(mismatch[0], where=where, fix=mismatch[1])
        self.template = None if self.form == "text" else resolve_template(data.template, tokenizer)
        self.encoder = spec.encoder(
            tokenizer,
            self.template,
            data.sequence_length,
            data.overlong,
            self.parts,
            data.train_on,
            data.split_special_tokens,
        )
        self.fingerprint = fingerprint(self._shape(tokenizer_fingerprint))
        self.folder = cache / self.fingerprint

    def _shape(self, tokenizer_fingerprint: str) -> dict[str, Any]:
        """Everything that shapes the store; no path is among it."""
        return {
            "code": CODE_VERSION,
            "content": [[part.kind, part.identity] for part in self.parts],
            "format": self.form,
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
        """Open the store, or wait for it, or make it."""
        if not self.is_ready():
            with _only_one(self.folder, self.source.path):
                if not self.is_ready():
                    shards = self._shards()
                    self._make(shards, WorkShare(), processes)
                    self._finish(shards)
        return PreparedSource(self.source.path, self.parts, Store(self.folder))

    def run_share(self, share: WorkShare, processes: int | None) -> None:
        """Make shards beside others that do the same; the last of them finishes the store."""
        if not self.is_ready():
            with _only_one(self.folder, self.source.path):
                shards = None if self.is_ready() else self._shards()
            if shards:
                self._make(shards, share, processes)
                if not shards.missing():
                    with _only_one(self.folder, self.source.path):
                        if not self.is_ready():
                            self._finish(shards)

    def is_ready(self) -> bool:
        """Whether the store is complete."""
        return (self.folder / MANIFEST).exists()

    def _shards(self) -> ShardBuilder:
        cuts = load_boundaries(self.folder)
        if cuts is None:
            for stray in self.folder.glob("shard-*"):  # cut in another way
                stray.unlink()
            cuts = self._cut()
            self._check_unchanged()
            save_boundaries(self.folder, cuts)
        return ShardBuilder(
            self.folder, cuts, self.parts, self.form, self.source.columns, self.encoder
        )

    def _cut(self) -> ShardBoundaries:
        """Read all rows once, so that a broken one is told before hours of work on the others."""
        with progress(f"reading {self.source.path}", len(self.parts)) as meter:
            cuts = find_boundaries(self._read(meter))
        if len(cuts) == 1:
            raise EmptyDataError(
                "the source has no rows", where=self.source.path, fix="correct `path`"
            )
        return cuts

    def _read(self, meter: Meter) -> Iterator[Record]:
        for record in read_records(self.parts, self.form, self.source.columns):
            meter.advance(record.file_index - meter.done)
            yield record

    def _make(self, shards: ShardBuilder, share: WorkShare, processes: int | None) -> None:
        if there := len(shards) - len(shards.missing()):
            say(f"{self.source.path}: {there:,} of {len(shards):,} shards are there, going on")
        shards.make(f"tokenising {self.source.path}", share, processes)

    def _check_unchanged(self) -> None:
        for part in self.parts:
            part.check_unchanged(again=True)

    def _finish(self, shards: ShardBuilder) -> None:
        self._check_unchanged()
        StoreWriter(self.folder, len(shards)).finish(
            packing=self.spec.packing,
            packed=self.data.packing,
            sequence_length=self.data.sequence_length,
            about={"fingerprint": self.fingerprint, "code_version": CODE_VERSION},
            where=self.source.path,
        )
        for leftover in (
            self.folder / BOUNDARIES_FILE,
            *self.folder.glob(".shard-*"),
        ):  # of killed ones
            leftover.unlink()


@contextmanager
def _only_one(folder: Path, name: str) -> Iterator[None]:
    """The lock on a store; waiting for it is announced."""
    lock = FolderLock(folder)
    if not lock.acquire():
        say(f"{name}: waiting for {lock.holder()}, which prepares the same data")
        lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
