"""Sources into a mixture: read, render, tokenise, pack and store, once for each fingerprint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dtrain.config.schema import Data, Source
from dtrain.core.errors import UserError
from dtrain.core.files import FolderLock
from dtrain.core.hashes import fingerprint
from dtrain.core.log import Meter, progress, say
from dtrain.data.conversations import Talk
from dtrain.data.formats import Record, detect, read
from dtrain.data.mixing import mix
from dtrain.data.mixture import Mixture, Prepared, Row, check_vocabulary
from dtrain.data.sources import find_parts
from dtrain.data.store import MANIFEST, Store
from dtrain.data.templates import resolve_template
from dtrain.data.tokenise import Document, Tokeniser, check_tokenizer
from dtrain.data.writer import Writer

__all__ = ["Mixture", "Row", "check_vocabulary", "prepare"]

CODE_VERSION = 2  # raise it whenever the same input would give another store
SHARD_ROWS = 10_000
SHARD_CHARACTERS = 1 << 26  # of long texts, so that a shard fits in memory
BATCH_ROWS = 500  # in one call of the tokenizer

Kind = Literal["cpt", "sft"]


def prepare(
    data: Data,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_fingerprint: str,
    cache: Path,
) -> Mixture:
    """Open the prepared data of a stage; prepare first what is not there yet.

    Each source has a store of its own, `cache/<fingerprint>`, so that a changed weight or an
    added source costs nothing for the others. Interrupted, the next call goes on; while another
    process works on a source, this one waits and says so.

    Args:
        data: group of the recipe.
        kind: cpt supervises every token, sft answers only.
        tokenizer: of the base model.
        tokenizer_fingerprint: of everything that shapes its token ids.
        cache: folder for prepared data.

    Raises:
        UserError: a source, a row or the tokenizer cannot be used.
    """
    check_tokenizer(tokenizer, kind)
    names = [source.path for source in data.sources]
    mix([1] * len(names), [source.weight for source in data.sources], names)  # fails at once
    prepared = [
        _Preparation(data, source, kind, tokenizer, tokenizer_fingerprint, cache).run()
        for source in data.sources
    ]
    weights = [source.weight for source in data.sources]
    shares = mix([source.store.rows for source in prepared], weights, names)
    return Mixture(prepared, shares, data.sequence_tokens)


class _Preparation:
    """The preparation of one source."""

    def __init__(
        self,
        data: Data,
        source: Source,
        kind: Kind,
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_fingerprint: str,
        cache: Path,
    ) -> None:
        self.data, self.source, self.kind = data, source, kind
        self.parts = find_parts(source, cache)
        self.form = source.format if source.format != "auto" else detect(self.parts, source.columns)
        _check_form(self.form, source, kind)
        self.template = None if self.form == "text" else resolve_template(data.template, tokenizer)
        self.tokeniser = Tokeniser(
            tokenizer,
            self.template,
            kind == "sft",
            data.sequence_tokens,
            data.overlong,
            self.parts,
            data.train_on,
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
            "kind": self.kind,
            "template": self.template.source if self.template else None,
            "tokenizer": tokenizer_fingerprint,
            "sequence_tokens": self.data.sequence_tokens,
            "packing": self.data.packing,
            "overlong": self.data.overlong if self.kind == "sft" else None,
            "train_on": self.data.train_on if self.kind == "sft" else None,
        }

    def run(self) -> Prepared:
        """Open the store, or wait for it, or make it."""
        if not (self.folder / MANIFEST).exists():
            with _only_one(self.folder, self.source.path):
                if not (self.folder / MANIFEST).exists():
                    self._make()
        return Prepared(self.source.path, self.source.weight, self.parts, Store(self.folder))

    def _make(self) -> None:
        total = self._check_rows()
        writer = Writer(self.folder)
        if writer.rows_read:
            say(f"{self.source.path}: going on after row {writer.rows_read:,} of {total:,}")
        with progress(f"tokenising {self.source.path}", total, writer.rows_read) as meter:
            records = islice(self._records(), writer.rows_read, None)
            while shard := list(_shard(records)):
                counts: Counter[str] = Counter()
                documents = self._tokenise(shard, counts, meter)
                writer.add(documents, writer.rows_read + len(shard), counts)
        self._finish(writer)

    def _records(self) -> Iterator[Record]:
        return read(self.parts, self.form, self.source.columns)

    def _check_rows(self) -> int:
        """Read all rows once, so that a broken one is told before hours of work on the others."""
        total = 0
        with progress(f"reading {self.source.path}", len(self.parts)) as meter:
            for record in self._records():
                total += 1
                meter.advance(record.part - meter.done)
        if not total:
            raise UserError("the data set is empty", where=self.source.path, fix="correct `path`")
        return total

    def _tokenise(
        self, records: list[Record], counts: Counter[str], meter: Meter
    ) -> list[Document]:
        documents: list[Document] = []
        for start in range(0, len(records), BATCH_ROWS):
            batch = records[start : start + BATCH_ROWS]
            documents += self.tokeniser.documents(batch, counts)
            meter.advance(len(batch))
        return documents

    def _finish(self, writer: Writer) -> None:
        writer.finish(
            kind=self.kind,
            packing=self.data.packing,
            sequence_tokens=self.data.sequence_tokens,
            about={"fingerprint": self.fingerprint, "code_version": CODE_VERSION},
            where=self.source.path,
        )


def _check_form(form: str, source: Source, kind: Kind) -> None:
    """Refuse rows that the stage cannot learn from."""
    where = f"{source.path}: format: {form} with kind: {kind}"
    if form == "text" and kind == "sft":
        fix = "write kind: cpt, or name rows that have answers"
        raise UserError("a text has no answers to learn", where=where, fix=fix)
    if form in ("preference", "kto"):
        what = "preferences need a stage that compares two answers"
        fix = "name the wanted answers alone: format: prompt_completion with columns: "
        raise UserError(what, where=where, fix=f"{fix}{{completion: chosen}}")


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


def _shard(records: Iterator[Record]) -> Iterator[Record]:
    """The next records, until there is enough for a shard."""
    characters = 0
    for record in islice(records, SHARD_ROWS):
        yield record
        characters += _size(record)
        if characters >= SHARD_CHARACTERS:
            return


def _size(record: Record) -> int:
    if isinstance(record.value, Talk):
        return sum(len(message["content"]) for message in record.value.messages)
    return len(record.value) if isinstance(record.value, str) else 0
