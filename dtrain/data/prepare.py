"""Sources into a mixture: read, render, tokenise, pack and store, once for each fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dtrain.config.schema import Data, Source
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.core.hashes import fingerprint
from dtrain.core.locks import FolderLock
from dtrain.core.log import Meter, progress, say
from dtrain.data.chat_templates import resolve_template
from dtrain.data.packed_dataset import Mixture, Prepared, Row, check_vocabulary
from dtrain.data.records import Record, detect, read
from dtrain.data.sampling import mix
from dtrain.data.shard_boundaries import CUTS_FILE, Cuts, cut, load_cuts, save_cuts
from dtrain.data.shards import Shards, Share
from dtrain.data.sources import find_source_files
from dtrain.data.store import MANIFEST, Store
from dtrain.data.store_writer import Writer
from dtrain.data.tokenize import Tokeniser, check_tokenizer

__all__ = ["Mixture", "Row", "check_vocabulary", "prepare"]

CODE_VERSION = 6  # raise it whenever the same input would give another store or manifest

Kind = Literal["cpt", "sft"]

WANTED_ALONE = {
    "preference": "format: prompt_completion, columns: {completion: chosen, prompt: NAME}, where "
    "NAME is the column of what was asked, such as prompt or conversations",
    "kto": "keep the rows with a true label, format: messages or prompt_completion",
}


def prepare(
    data: Data,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_fingerprint: str,
    cache: Path,
    processes: int | None = None,
    global_batch: int = 1,
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
        processes: that tokenise; None for as many as cores and memory allow. The stores they make
            do not depend on it.
        global_batch: sequences of a step, where weights change at steps.

    Raises:
        UserError: a source, a row or the tokenizer cannot be used.
    """
    check_tokenizer(tokenizer, kind)
    names = [source.path for source in data.all_sources]
    weights = {steps * global_batch: given for steps, given in data.weights_by_step.items()}
    replay = data.replay.ratio if data.replay else None
    mix([1] * len(names), weights, names, replay)  # fails at once
    prepared = [
        _Preparation(data, source, kind, tokenizer, tokenizer_fingerprint, cache).run(processes)
        for source in data.all_sources
    ]
    shares = mix([source.store.rows for source in prepared], weights, names, replay)
    return Mixture(prepared, shares, data.sequence_length)


def prepare_share(
    data: Data,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_fingerprint: str,
    cache: Path,
    share: Share,
    processes: int | None = None,
) -> bool:
    """Do one share of `prepare`, beside others on this node or others that share `cache`.

    Returns:
        Whether all is ready; if not, others still work on what is left, and the last of them (or
        the next `prepare`) finishes.

    Raises:
        UserError: as `prepare`.
    """
    check_tokenizer(tokenizer, kind)
    own = [
        _Preparation(data, source, kind, tokenizer, tokenizer_fingerprint, cache)
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
        kind: Kind,
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_fingerprint: str,
        cache: Path,
    ) -> None:
        self.data, self.source, self.kind = data, source, kind
        self.parts = find_source_files(source, cache)
        self.form = source.format if source.format != "auto" else detect(self.parts, source.columns)
        _check_form(self.form, source, kind)
        self.template = None if self.form == "text" else resolve_template(data.template, tokenizer)
        self.tokeniser = Tokeniser(
            tokenizer,
            self.template,
            kind == "sft",
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
            "kind": self.kind,
            "template": self.template.source if self.template else None,
            "tokenizer": tokenizer_fingerprint,
            "sequence_length": self.data.sequence_length,
            "packing": self.data.packing,
            "split_special_tokens": self.data.split_special_tokens,
            "overlong": self.data.overlong if self.kind == "sft" else None,
            "train_on": self.data.train_on if self.kind == "sft" else None,
        }

    def run(self, processes: int | None) -> Prepared:
        """Open the store, or wait for it, or make it."""
        if not self.is_ready():
            with _only_one(self.folder, self.source.path):
                if not self.is_ready():
                    shards = self._shards()
                    self._make(shards, Share(), processes)
                    self._finish(shards)
        return Prepared(self.source.path, self.parts, Store(self.folder))

    def run_share(self, share: Share, processes: int | None) -> None:
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

    def _shards(self) -> Shards:
        cuts = load_cuts(self.folder)
        if cuts is None:
            for stray in self.folder.glob("shard-*"):  # cut in another way
                stray.unlink()
            cuts = self._cut()
            self._check_unchanged()
            save_cuts(self.folder, cuts)
        return Shards(self.folder, cuts, self.parts, self.form, self.source.columns, self.tokeniser)

    def _cut(self) -> Cuts:
        """Read all rows once, so that a broken one is told before hours of work on the others."""
        with progress(f"reading {self.source.path}", len(self.parts)) as meter:
            cuts = cut(self._read(meter))
        if len(cuts) == 1:
            raise EmptyDataError(
                "there is no row in it", where=self.source.path, fix="correct `path`"
            )
        return cuts

    def _read(self, meter: Meter) -> Iterator[Record]:
        for record in read(self.parts, self.form, self.source.columns):
            meter.advance(record.file_index - meter.done)
            yield record

    def _make(self, shards: Shards, share: Share, processes: int | None) -> None:
        if there := len(shards) - len(shards.missing()):
            say(f"{self.source.path}: {there:,} of {len(shards):,} shards are there, going on")
        shards.make(f"tokenising {self.source.path}", share, processes)

    def _check_unchanged(self) -> None:
        for part in self.parts:
            part.check_unchanged(again=True)

    def _finish(self, shards: Shards) -> None:
        self._check_unchanged()
        Writer(self.folder, len(shards)).finish(
            kind=self.kind,
            packing=self.data.packing,
            sequence_length=self.data.sequence_length,
            about={"fingerprint": self.fingerprint, "code_version": CODE_VERSION},
            where=self.source.path,
        )
        for leftover in (self.folder / CUTS_FILE, *self.folder.glob(".shard-*")):  # of killed ones
            leftover.unlink()


def _check_form(form: str, source: Source, kind: Kind) -> None:
    """Refuse rows that the stage cannot learn from."""
    where = f"{source.path}: format: {form} with kind: {kind}"
    if form == "text" and kind == "sft":
        fix = "write kind: cpt, or name rows that have answers"
        raise UserError("a text has no answers to learn", where=where, fix=fix)
    if form in WANTED_ALONE:
        what = "preferences need a stage that compares two answers"
        raise UserError(what, where=where, fix=f"train on the wanted answers: {WANTED_ALONE[form]}")


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
