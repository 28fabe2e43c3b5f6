"""Clean a corpus that is too large for one machine, as a datatrove pipeline.

Two passes over the rows, with datatrove's MinHash steps between them, all on disk:

    check    rows → checks of each row → OUT/work/checked, signatures      any number of tasks
    buckets  signatures → pairs of near duplicates                         a task per bucket
    cluster  pairs → all but the first row of each cluster                 one task
    rest     OUT/work/checked without those rows → OUT/rows                as many as `check`

A finished task is not run again; a killed one starts over and overwrites its own files. Removed
rows are listed in OUT/quarantine in the format of `dtrain data clean`. Findings that need all rows
or a tokenizer (`template`, `overlong`, `inconsistent`) are left to a `dtrain data scan` of the
result. Unlike a scan, datatrove does not compare candidates: rows that share a bucket count as near
duplicates, which nine of ten pairs do at a similarity of 0.8, and two of ten at 0.6. Questions with
other numbers share none.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
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

from dtrain.config.data import Clean, Source
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.files import json_line, read_sealed, write_sealed
from dtrain.core.hashes import fingerprint
from dtrain.data.duplicates import SHINGLE_CHARACTERS, normalize_text, shingle_hashes, text_key
from dtrain.data.formats import to_row
from dtrain.data.records import BadRecord, Record, SourceRows
from dtrain.data.sources import SourceFile, file_kind
from dtrain.data.text_checks import row_text
from dtrain.data_quality.clean import (
    KEEP,
    MASK,
    QUARANTINE,
    choose_action,
    mask_value,
    policy_actions,
)
from dtrain.data_quality.content_tokens import numbers, tokens
from dtrain.data_quality.decontamination import HeldOutIndex
from dtrain.data_quality.finding_types import BROKEN, EXACT, NEAR
from dtrain.data_quality.row_checks import check_row, short_key

SIDES = "\0"  # between the question and the answer of a document
BUCKETS = MinhashConfig().num_buckets


def open_corpus(sources: list[Source]) -> list[SourceRows]:
    """Find the files of sources in folders; nothing is opened or hashed.

    Raises:
        UserError: a source has no readable file, or no explicit `format`.
    """
    return [_open_source(source) for source in sources]


def _open_source(source: Source) -> SourceRows:
    path = local_path(source.path)
    paths = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    paths = paths or sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    root = path.resolve()
    if path.is_dir():  # a symlink that someone else put there must not lead to other files
        paths = [file for file in paths if file.resolve().is_relative_to(root)]
    files = [SourceFile(str(f), file_kind(f), "", f) for f in paths if file_kind(f) and f.is_file()]
    if not files:
        raise UserError("no readable file here", where=source.path, fix="correct `path`")
    if source.format == "auto":
        fix = "set `format`: each task would detect it from its own files, and tasks could differ"
        raise UserError("a corpus needs an explicit format", where=source.path, fix=fix)
    columns: dict[Any, str] = dict(source.columns)
    return SourceRows(source.path, files, source.format, columns)


@dataclass(frozen=True)
class PipelineJob:
    """One job of the pipeline: datatrove's blocks, and the number of its tasks."""

    name: str
    blocks: list[Any]
    tasks: int


def build_jobs(
    sources: list[SourceRows],
    policy: Clean,
    held_out: HeldOutIndex | None,
    out: Path,
    tasks: int,
) -> list[PipelineJob]:
    """The jobs of the pipeline, each to be run when the one before it has finished.

    Args:
        sources: from `open_corpus`.
        policy: the action for each kind of finding.
        held_out: evaluation data that the rows must not contain.
        out: output folder.
        tasks: number of tasks that share the files; one file is read by one task.
    """
    work, quarantine = out / "work", out / "quarantine"
    actions = policy_actions(policy)
    check = [
        SourceReader(
            sources, actions[BROKEN], JsonLinesWriter(quarantine, "broken-{rank:05d}", _removal)
        ),
        RowFilter(actions, held_out, JsonLinesWriter(quarantine, "check-{rank:05d}", _removal)),
        JsonLinesWriter(work / "checked", "{rank:05d}", _checked_row),
    ]
    rest: list[Any] = [CheckedRowReader(work / "checked")]
    deduplication: list[PipelineJob] = []
    kind = NEAR if actions[NEAR] != KEEP else EXACT
    if actions[kind] != KEEP:
        config = MinhashConfig(num_buckets=BUCKETS)
        signatures, pairs, removed = (str(work / n) for n in ("signatures", "pairs", "removed"))
        check.append(ShingleSignatures(signatures, config, exact=kind == EXACT))
        buckets = MinhashDedupBuckets(signatures, pairs, config=config)
        cluster = MinhashDedupCluster(pairs, removed, config=config)
        deduplication = [
            PipelineJob("buckets", [buckets], BUCKETS),
            PipelineJob("cluster", [cluster], 1),
        ]
        line = partial(_duplicate_removal, kind, actions[kind])
        writer = JsonLinesWriter(quarantine, "duplicates-{rank:05d}", line)
        rest.append(MinhashDedupFilter(removed, writer))
    rest.append(JsonLinesWriter(out / "rows", "source-{source}/{rank:05d}", _output_row))
    return [PipelineJob("check", check, tasks), *deduplication, PipelineJob("rest", rest, tasks)]


def check_settings(sources: list[SourceRows], policy: Clean, out: Path, tasks: int) -> None:
    """Record the settings of an output folder, or compare them with those on record.

    datatrove skips finished tasks, whatever settings they ran with.

    Raises:
        UserError: the folder was started with other files, another policy or other tasks.
    """
    files = [[f.name, f.path and f.path.stat().st_size] for s in sources for f in s.files]
    settings = {"files": fingerprint(files), "policy": policy.model_dump(), "tasks": tasks}
    path = out / "corpus.json"
    if not path.exists():
        write_sealed(path, settings)
        return
    recorded = read_sealed(path)
    if changed := [name for name, value in settings.items() if recorded.get(name) != value]:
        message = f"was started with different {', '.join(changed)}"
        fix = "choose another folder, or restore the settings"
        raise UserError(message, where=str(out), fix=fix)


class JsonLinesWriter(PipelineStep):
    """Write documents as gzipped JSON lines; a file appears complete, with reproducible bytes.

    datatrove's own writer leaves half a file when it is killed, and puts a timestamp in each.
    """

    type, name = "💽 - WRITER", "dtrain JSON lines"

    def __init__(self, folder: Path, filename: str, to_line: Callable[[Document], Any]) -> None:
        """Write `filename`, a format of {rank} and {source}, in a folder."""
        super().__init__()
        self.folder, self.filename, self.to_line = folder, filename, to_line
        self.files: dict[Path, gzip.GzipFile] = {}

    def __enter__(self) -> JsonLinesWriter:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        for path, file in self.files.items():
            file.close()
            if error_type is None:
                os.replace(_partial_path(path), path)
        self.files = {}

    def write(self, document: Document, rank: int = 0) -> None:
        """Add a line to the file of the document's task and source."""
        source = document.metadata["source"] + 1
        path = self.folder / f"{self.filename.format(rank=rank, source=source)}.jsonl.gz"
        if path not in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files[path] = gzip.GzipFile(_partial_path(path), "wb", compresslevel=6, mtime=0)
        self.files[path].write(json_line(self.to_line(document)).encode())

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Write every document and pass it on."""
        with self:
            for document in data:
                self.write(document, rank)
                yield document


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _output_row(document: Document) -> Any:
    return document.metadata["row"]


def _checked_row(document: Document) -> dict[str, Any]:
    return {name: document.metadata[name] for name in ("source", "location", "row")}


def _removal(document: Document) -> dict[str, Any]:
    """A line of quarantine, in the format of `dtrain data clean`."""
    metadata = document.metadata
    names = ["reasons", "action", "location", "error"]
    if metadata["action"] == QUARANTINE:
        names.append("row")
    return {name: metadata[name] for name in names if name in metadata}


def _duplicate_removal(kind: str, action: str, document: Document) -> dict[str, Any]:
    document.metadata |= {"reasons": [kind], "action": action}
    return _removal(document)


class SourceReader(PipelineStep):
    """Read rows of all formats, each task its share of the files; unreadable rows are removed."""

    type, name = "📖 - READER", "dtrain rows"

    def __init__(self, sources: list[SourceRows], broken: str, quarantine: JsonLinesWriter) -> None:
        super().__init__()
        self.sources, self.broken, self.quarantine = sources, broken, quarantine

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield this task's rows as documents."""
        files = [
            (i, source, file) for i, source in enumerate(self.sources) for file in source.files
        ]
        with self.quarantine:
            for index, source, file in files[rank::world_size]:
                for item in replace(source, files=[file]).rows():
                    document = _to_document(item, index, file)
                    if isinstance(item, Record):
                        yield document
                    elif self.broken == "stop":
                        raise item.error
                    else:
                        self.quarantine.write(document, rank)


def _to_document(item: Record | BadRecord, source: int, file: SourceFile) -> Document:
    location = file.location(item.row_number)
    metadata: dict[str, Any] = {"source": source, "location": location}
    if isinstance(item, BadRecord):
        metadata |= {"reasons": [BROKEN], "action": QUARANTINE, "error": item.error.message}
    else:
        metadata["value"] = item.value
    return Document(text="", id=location, metadata=metadata)


class RowFilter(PipelineStep):
    """Apply dtrain's checks of single rows, and the policy's actions."""

    type, name = "🔻 - FILTER", "dtrain checks"

    def __init__(
        self,
        actions: dict[str, str],
        held_out: HeldOutIndex | None,
        quarantine: JsonLinesWriter,
    ) -> None:
        super().__init__()
        self.actions, self.held_out, self.quarantine = actions, held_out, quarantine

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield the rows that stay, masked where the policy says so."""
        with self.quarantine:
            for document in data:
                action = self._check(document)
                if action in (KEEP, MASK):
                    yield document
                else:
                    self.quarantine.write(document, rank)

    def _check(self, document: Document) -> str:
        value = document.metadata.pop("value")
        findings = check_row(row_text(value), self.held_out)
        action, reasons = choose_action(dict.fromkeys(f.kind for f in findings), self.actions)
        for reason in reasons:
            self.stat_update(f"{action}_{reason}")
        value = mask_value(value) if action == MASK else value
        text = row_text(value)
        document.text = text.full if text.is_text else f"{text.question}{SIDES}{text.answer}"
        document.metadata |= {"row": to_row(value), "reasons": reasons, "action": action}
        return action


class CheckedRowReader(PipelineStep):
    """Read the rows that the task of the same rank wrote in the first pass, in their order."""

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
                    yield Document(text=" ", id=metadata["location"], metadata=metadata)


class ShingleSignatures(MinhashDedupSignature):
    """datatrove's MinHash signatures over dtrain's character shingles.

    datatrove's own shingles need a word tokenizer per language. With `exact`, a text has a single
    shingle, itself, so only equal texts match.
    """

    def __init__(self, folder: str, config: MinhashConfig, exact: bool) -> None:
        PipelineStep.__init__(self)  # the constructor of the base class loads a word tokenizer
        self.output_folder = get_datafolder(folder)
        self.config, self.exact = config, exact
        self.num_hashes = config.num_buckets * config.hashes_per_bucket
        self._parameters = None
        self._hash_func = create_hash_func(config.hash_config)
        self.skip_existing_sigs = False

    def get_shingles(self, text: str) -> NDArray[np.uint64]:
        """Hashes of the shingles of a text, [shingles, 1]."""
        question, separator, answer = text.partition(SIDES)
        normalized = normalize_text(f"{question}\n{answer}")
        if self.exact:
            return np.array([[text_key(normalized)]], np.uint64)
        hashes = shingle_hashes([normalized], SHINGLE_CHARACTERS)[0].reshape(-1, 1)
        # Questions of one template with other numbers share no shingle, as a scan groups them.
        asked = short_key(numbers(tokens(question))) if separator else 0
        return hashes ^ np.uint64(asked)
