"""Cleaning of corpora that no single machine holds, as a pipeline of datatrove.

Two passes over the rows, and datatrove's MinHash between them (its four steps, on disk):

    check    rows → checks of one row → OUT/work/checked, signatures      any number of tasks
    buckets  signatures → pairs that are alike                            a task for each bucket
    cluster  pairs → all but the first of each group                      one task
    rest     OUT/work/checked without those → OUT/rows                    as many as `check`

A task that was finished is not run again; one that was killed starts anew and overwrites its own
files. What goes is told in OUT/quarantine as `dtrain data clean` tells it. What only all rows or a
tokenizer show is left to `dtrain data scan` of what remains: `template`, `overlong`,
`inconsistent`. Unlike a scan, datatrove does not compare candidates: rows that share a bucket
count as alike, which nine of ten pairs do at a similarity of 0.8, and two of ten at 0.6.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import create_hash_func
from numpy.typing import NDArray

from dtrain.config.schema import Clean, Source
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.files import read_sealed, write_sealed
from dtrain.core.hashes import fingerprint
from dtrain.data.records import BadRecord, Record
from dtrain.data.sources import SourceFile, file_kind
from dtrain.data_quality.clean import KEEP, MASK, QUARANTINE, STRENGTH, actions, as_row, masked
from dtrain.data_quality.decontamination import HeldOut
from dtrain.data_quality.finding_types import BROKEN, EXACT, NEAR
from dtrain.data_quality.row_checks import findings, key
from dtrain.data_quality.sample import sample_of
from dtrain.data_quality.scan import Input
from dtrain.data_quality.shingles import WIDTH, plain, run_hashes

BUCKETS = MinhashConfig().num_buckets


def corpus(sources: list[Source]) -> list[Input]:
    """The files of sources that lie in folders, each file a part; nothing is hashed or opened.

    Raises:
        UserError: a source has no file that can be read, or no `format` that says what it holds.
    """
    return [_input(source) for source in sources]


def _input(source: Source) -> Input:
    path = local_path(source.path)
    found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    found = found or sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    inside = path.resolve()
    if path.is_dir():  # whoever can write into it must not choose what is read elsewhere
        found = [file for file in found if file.resolve().is_relative_to(inside)]
    parts = [SourceFile(str(f), file_kind(f), "", f) for f in found if file_kind(f) and f.is_file()]
    if not parts:
        raise UserError("no file here that can be read", where=source.path, fix="correct `path`")
    if source.format == "auto":
        fix = "name `format`: a task that looks by itself may find another than its neighbour"
        raise UserError("the format of a corpus must be named", where=source.path, fix=fix)
    columns: dict[Any, str] = dict(source.columns)
    return Input(source.path, parts, source.format, columns)


@dataclass(frozen=True)
class Step:
    """One job of the pipeline: datatrove's blocks, and how many tasks share them."""

    name: str
    blocks: list[Any]
    tasks: int


def steps(
    inputs: list[Input], policy: Clean, known: HeldOut | None, out: Path, tasks: int
) -> list[Step]:
    """The jobs, each to be run when the one before is finished.

    Args:
        tasks: that share the files; a file is read by one task alone.
    """
    work, away = out / "work", out / "quarantine"
    what = actions(policy)
    check = [
        Rows(inputs, what[BROKEN], Lines(away, "broken-{rank:05d}", told_line)),
        Check(what, known, Lines(away, "check-{rank:05d}", told_line)),
        Lines(work / "checked", "{rank:05d}", carried_line),
    ]
    rest: list[Any] = [Checked(work / "checked")]
    between: list[Step] = []
    kind = NEAR if what[NEAR] != KEEP else EXACT
    if what[kind] != KEEP:
        config = MinhashConfig(num_buckets=BUCKETS)
        signatures, pairs, gone = (str(work / n) for n in ("signatures", "pairs", "gone"))
        check.append(Signatures(signatures, config, whole=kind == EXACT))
        blocks = MinhashDedupBuckets(signatures, pairs, config=config)
        between = [
            Step("buckets", [blocks], BUCKETS),
            Step("cluster", [MinhashDedupCluster(pairs, gone, config=config)], 1),
        ]
        told = partial(alike_line, kind, what[kind])
        rest.append(MinhashDedupFilter(gone, Lines(away, "alike-{rank:05d}", told)))
    rest.append(Lines(out / "rows", "source-{source}/{rank:05d}", row_line))
    return [Step("check", check, tasks), *between, Step("rest", rest, tasks)]


def settle(inputs: list[Input], policy: Clean, out: Path, tasks: int) -> None:
    """Note what the folder is made of: datatrove skips finished tasks, whatever they did.

    Raises:
        UserError: it was begun with other files, another policy or other tasks.
    """
    files = [[p.name, p.path and p.path.stat().st_size] for one in inputs for p in one.parts]
    settings = {"files": fingerprint(files), "policy": policy.model_dump(), "tasks": tasks}
    path = out / "corpus.json"
    if not path.exists():
        write_sealed(path, settings)
        return
    known = read_sealed(path)
    if changed := [name for name, value in settings.items() if known.get(name) != value]:
        what = f"was begun with other {', '.join(changed)}"
        raise UserError(what, where=str(out), fix="choose another folder, or go back to that")


class Lines(PipelineStep):
    """Documents as lines of gzipped JSON: a file appears when it is whole, the same bytes always.

    datatrove's own writer leaves half a file when it is killed, and the time of day in each.
    """

    type, name = "💽 - WRITER", "dtrain lines"

    def __init__(self, folder: Path, names: str, line: Callable[[Document], Any]) -> None:
        super().__init__()
        self.folder, self.names, self.line = folder, names, line
        self.files: dict[Path, gzip.GzipFile] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for path, file in self.files.items():
            file.close()
            if kind is None:
                os.replace(_beside(path), path)
        self.files = {}

    def write(self, document: Document, rank: int = 0) -> None:
        """Add a line to the file of its task and source."""
        name = self.names.format(rank=rank, source=document.metadata["source"] + 1)
        path = self.folder / f"{name}.jsonl.gz"
        if path not in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files[path] = gzip.GzipFile(_beside(path), "wb", compresslevel=6, mtime=0)
        text = json.dumps(self.line(document), ensure_ascii=False) + "\n"
        self.files[path].write(text.encode())

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Write every document and pass it on."""
        with self:
            for document in data:
                self.write(document, rank)
                yield document


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def row_line(document: Document) -> Any:
    return document.metadata["row"]


def carried_line(document: Document) -> dict[str, Any]:
    return {name: document.metadata[name] for name in ("source", "place", "row")}


def told_line(document: Document) -> dict[str, Any]:
    """A line of quarantine, as `dtrain data clean` writes it."""
    known = document.metadata
    told = {name: known[name] for name in ("reasons", "action", "place", "fault") if name in known}
    return told | (
        {"row": known["row"]} if known["action"] == QUARANTINE and "row" in known else {}
    )


def alike_line(kind: str, action: str, document: Document) -> dict[str, Any]:
    document.metadata |= {"reasons": [kind], "action": action}
    return told_line(document)


class Rows(PipelineStep):
    """Rows of all formats, every task its share of the files; a broken row is told and left out."""

    type, name = "📖 - READER", "dtrain rows"

    def __init__(self, inputs: list[Input], broken: str, away: Lines) -> None:
        super().__init__()
        self.inputs, self.broken, self.away = inputs, broken, away

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield this task's rows as documents."""
        shares = [(n, one, part) for n, one in enumerate(self.inputs) for part in one.parts]
        with self.away:
            for source, one, part in shares[rank::world_size]:
                for item in Input(one.name, [part], one.form, one.columns).rows():
                    document = _document(item, source, part)
                    if isinstance(item, Record):
                        yield document
                    elif self.broken == "stop":
                        raise item.error
                    else:
                        self.away.write(document, rank)


def _document(item: Record | BadRecord, source: int, part: SourceFile) -> Document:
    place = part.location(item.row_number)
    more: dict[str, Any] = {"source": source, "place": place}
    if isinstance(item, BadRecord):
        more |= {"reasons": [BROKEN], "action": QUARANTINE, "fault": item.error.what}
        return Document(text="", id=place, metadata=more)
    return Document(text="", id=place, metadata={**more, "value": item.value})


class Check(PipelineStep):
    """dtrain's checks of one row, and what the policy says of what they find."""

    type, name = "🔻 - FILTER", "dtrain checks"

    def __init__(self, what: dict[str, str], known: HeldOut | None, away: Lines) -> None:
        super().__init__()
        self.what, self.known, self.away = what, known, away

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield what stays, masked where the policy says so."""
        with self.away:
            for document in data:
                action = self._judge(document)
                if action in (KEEP, MASK):
                    yield document
                else:
                    self.away.write(document, rank)

    def _judge(self, document: Document) -> str:
        value = document.metadata.pop("value")
        found = dict.fromkeys(kind for kind, *_ in findings(sample_of(value), self.known))
        reasons = [kind for kind in found if self.what[kind] != KEEP]
        action = max((self.what[kind] for kind in reasons), key=STRENGTH.index, default=KEEP)
        for reason in reasons:
            self.stat_update(f"{action}_{reason}")
        value = masked(value) if action == MASK else value
        document.text = sample_of(value).whole
        document.metadata |= {"row": as_row(value), "reasons": reasons, "action": action}
        return action


class Checked(PipelineStep):
    """What the first pass left, read by the task of the same number: so rows keep their place."""

    type, name = "📖 - READER", "dtrain checked rows"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield this task's rows as documents."""
        path = self.folder / f"{rank:05d}.jsonl.gz"
        if path.exists():
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for line in file:
                    metadata = json.loads(line)
                    yield Document(text=" ", id=metadata["place"], metadata=metadata)


class Signatures(MinhashDedupSignature):
    """datatrove's signatures over dtrain's runs of characters.

    Its own splits words with a package for each language; runs of characters need none, and treat
    Chinese as English. With `whole` a text has one run, itself: only equal texts are then alike.
    """

    def __init__(self, folder: str, config: MinhashConfig, whole: bool) -> None:
        PipelineStep.__init__(self)  # not that of the class, which loads such a package
        self.output_folder = get_datafolder(folder)
        self.config, self.whole = config, whole
        self.num_hashes = config.num_buckets * config.hashes_per_bucket
        self._parameters = None
        self._hash_func = create_hash_func(config.hash_config)
        self.skip_existing_sigs = False

    def get_shingles(self, text: str) -> NDArray[np.uint64]:
        """Hashes of the runs of a text, [runs, 1]."""
        if self.whole:
            return np.array([[key(plain(text))]], np.uint64)
        return run_hashes([plain(text)], WIDTH)[0].reshape(-1, 1)
