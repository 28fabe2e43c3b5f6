"""Write extracted rows as the training and held-out files of a recipe, after a scan.

FOLDER/domain-train.jsonl, domain-heldout.jsonl   texts
FOLDER/task-train.jsonl, task-heldout.jsonl       conversations
FOLDER/left-out.jsonl                             rows that the scan removed, with reasons
FOLDER/extract.json                               counts, reasons, and hashes of the files

A hash of its name puts a document into one of the splits as a whole.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.config.data import Clean, Source
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError
from dtrain.core.files import atomic_folder, json_line, read_json_lines, write_json
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.log import say
from dtrain.data.conversations import CALL_ROLES, ROLES
from dtrain.data.readers import iter_rows
from dtrain.data.records import open_source
from dtrain.data.remote import is_remote
from dtrain.data.sources import SourceFile, find_source_files
from dtrain.data_quality.clean import ACTIONS, QUARANTINE_FILE, clean
from dtrain.data_quality.decontamination import HeldOutIndex
from dtrain.data_quality.finding_types import BROKEN, FINDING_TYPES
from dtrain.data_quality.scan import scan
from dtrain.extraction.chat_fields import SUPPORT_ROLES, normalized
from dtrain.extraction.chat_rules import parse_rule
from dtrain.extraction.chats import SKIP, ChatExtractor
from dtrain.extraction.text_files import DOMAIN, TASK, ExtractedRow
from dtrain.pipeline.data_inspection import index_sources

TRAIN, HELD_OUT = "train", "heldout"
LEFT_OUT_FILE, SUMMARY_FILE = "left-out.jsonl", "extract.json"
ROW_FORMAT = {DOMAIN: "text", TASK: "messages"}
STAGE_KIND = {DOMAIN: "cpt", TASK: "sft"}
CONVERSATION_ROLES = ("user", "assistant", "system", SKIP)

# Addresses and numbers in documentation are examples; those in conversations are people's.
DOCUMENTATION_POLICY = Clean(broken="quarantine", personal="keep", inconsistent="quarantine")
CONVERSATION_POLICY = Clean(broken="quarantine")


@dataclass
class Extraction:
    """What an extraction wrote.

    Attributes:
        left_out: by reason.
        rows: number of rows by file.
        documents: number of documents by split.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    rows: dict[str, int] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)


def write_extraction(
    folder: Path,
    make_rows: Callable[[Counter[str]], Iterator[ExtractedRow]],
    policy: Clean,
    held_out_share: float,
) -> Extraction:
    """Write rows into a new folder, complete or not at all.

    Args:
        folder: output; it must not exist.
        make_rows: yields rows, and counts in its argument what it leaves out.
        policy: which rows the scan removes or masks.
        held_out_share: of the documents.

    Raises:
        UserError: the folder exists, or no row remains.
    """
    result = Extraction()
    with atomic_folder(folder) as work:
        raw = work / "raw"
        raw.mkdir()
        held_out = _write_raw(raw, make_rows(result.left_out), held_out_share, result)
        _split_raw(raw, held_out)
        _write_clean(work, HELD_OUT, policy, None, result)
        sources = [Source(path=str(path)) for path in sorted(work.glob(f"*-{HELD_OUT}.jsonl"))]
        _write_clean(work, TRAIN, policy, index_sources(sources), result)
        shutil.rmtree(raw)
        if not any(name.endswith(f"-{TRAIN}.jsonl") for name in result.rows):
            reasons = ", ".join(f"{reason} ({n:,})" for reason, n in result.left_out.items())
            raise UserError("no rows remain", where=str(folder), fix=f"left out: {reasons or '-'}")
        hashes = {path.name: file_hash(path) for path in sorted(work.glob("*.jsonl"))}
        summary = {"rows": result.rows, "documents": result.documents}
        write_json(
            work / SUMMARY_FILE, {**summary, "left_out": dict(result.left_out), "blake3": hashes}
        )
    return result


def _write_raw(
    raw: Path, rows: Iterator[ExtractedRow], held_out_share: float, result: Extraction
) -> set[str]:
    """Write all rows with their documents; return the documents that are held out."""
    documents: dict[str, float] = {}
    with ExitStack() as stack:
        files = {
            kind: stack.enter_context(open(raw / kind, "x", encoding="utf-8", newline="\n"))
            for kind in ROW_FORMAT
        }
        for document, kind, row in rows:
            documents.setdefault(document, _hash_share(document))
            try:
                files[kind].write(json_line([document, row]))
            except UnicodeEncodeError:
                result.left_out["rows with half a character (an unpaired surrogate)"] += 1
    held_out = {name for name, share in documents.items() if share < held_out_share}
    if not held_out and len(documents) > 1 and held_out_share:
        held_out = {min(documents, key=lambda name: documents[name])}
    result.documents = {TRAIN: len(documents) - len(held_out), HELD_OUT: len(held_out)}
    return held_out


def _hash_share(document: str) -> float:
    """A number from 0 to 1 that depends on the document's name alone."""
    return int(fingerprint(["extract 1", document])[:12], 16) / 16**12


def _split_raw(raw: Path, held_out: set[str]) -> None:
    for kind in ROW_FORMAT:
        with (
            open(raw / kind, encoding="utf-8") as lines,
            open(raw / f"{kind}-{TRAIN}.jsonl", "x", encoding="utf-8") as train,
            open(raw / f"{kind}-{HELD_OUT}.jsonl", "x", encoding="utf-8") as held,
        ):
            for line in lines:
                document, row = json.loads(line)
                file = held if document in held_out else train
                file.write(json_line(row))


def _write_clean(
    work: Path, split: str, policy: Clean, index: HeldOutIndex | None, result: Extraction
) -> None:
    """Write the rows of a split that a scan does not object to."""
    for kind in ROW_FORMAT:
        name = f"{kind}-{split}.jsonl"
        source = work / "raw" / name
        if not source.stat().st_size:
            continue
        rows = open_source(Source.model_validate({"path": str(source), "format": ROW_FORMAT[kind]}))
        cleaned = work / "raw" / f"{kind}-{split}"
        counts = clean(scan([rows], held_out=index), policy, cleaned)["counts"]
        kept = counts.get("keep", 0) + counts.get("mask", 0)
        if kept:
            result.rows[name] = kept
            (cleaned / "rows-1.jsonl").rename(work / name)
        for reason, number in counts.items():
            if reason not in ACTIONS:
                title = FINDING_TYPES[reason].title
                masked = " (masked)" if _is_masked(reason, policy) else ""
                result.left_out[f"{title}{masked}"] += number
        _append_left_out(work / LEFT_OUT_FILE, cleaned / QUARANTINE_FILE, name)


def _is_masked(reason: str, policy: Clean) -> bool:
    return reason != BROKEN and not hasattr(policy, reason) and policy.personal == "mask"


def _append_left_out(target: Path, quarantine: Path, name: str) -> None:
    with open(target, "a", encoding="utf-8", newline="\n") as out:
        for line in read_json_lines(quarantine):
            kept = {key: value for key, value in line.items() if key != "location"}
            out.write(json_line({"file": name, **kept}))


def extract_chats(
    path: str,
    roles: Mapping[str, str],
    keep: list[str],
    min_turns: int,
    cache: Path,
    left_out: Counter[str],
) -> Iterator[ExtractedRow]:
    """Rows of exported conversations (JSON, JSON lines, CSV, …).

    Args:
        path: a file, folder, glob or address.
        roles: of the export → user, assistant, system or skip, in addition to the known ones.
        keep: rules for good conversations and answers.
        min_turns: least number of answers in a conversation.
        cache: folder of downloaded files.
        left_out: counts what makes no row.

    Raises:
        UserError: there are no messages, a role is unknown, or a rule fits nothing.
    """
    known = {normalized(name): role for name, role in ROLES.items() if name not in CALL_ROLES}
    known = {name: SKIP if role == "tool" else role for name, role in known.items()}
    given = {normalized(name): role for name, role in roles.items()}
    rules = [parse_rule(text) for text in keep]
    extractor = ChatExtractor(known | SUPPORT_ROLES | given, rules, min_turns, left_out)
    if not is_remote(path) and not glob.has_magic(path) and not user_path(path).exists():
        raise UserError("no such file or folder", where=path)  # nor a data set of the hub
    for file in find_source_files(Source(path=path), cache):
        if file.is_prose:
            left_out[f"files of other types ({file.kind})"] += 1
            continue
        fields, rows = extractor.extract(_raw_rows(file), file.name)
        if fields is not None:
            say(f"{file.name}: {fields}")
        yield from rows
    _check_known(extractor, path)
    for (written, role), count in extractor.seen_roles.most_common():
        say(f"role {written} → {role}: {count:,} messages")


def _raw_rows(file: SourceFile) -> Iterator[tuple[str, Any]]:
    """Location and value of each row; an error in place of what cannot be read."""
    try:
        for number, parse in iter_rows(file):
            yield file.location(number), parse()
    except UserError as error:
        yield file.name, error


def _check_known(extractor: ChatExtractor, path: str) -> None:
    if unknown := extractor.unknown_roles:
        names = ", ".join(f"{name[:40]} ({n:,})" for name, n in unknown.most_common(8))
        fix = f"--role '{unknown.most_common(1)[0][0][:40]}=user', or assistant, system or skip"
        raise UserError(f"unknown roles: {names}", where=path, fix=fix)
    for rule in extractor.rules:
        if rule.text not in extractor.rules_seen:
            message = f"no conversation and no message has the key {'.'.join(rule.path)}"
            raise UserError(message, where=f"--keep {rule.text}", fix="name a key of the export")


def recipe_lines(folder: Path, rows: Mapping[str, int]) -> Iterator[str]:
    """Lines of a recipe that train on the files and evaluate on the held-out ones."""
    for kind, row_format in ROW_FORMAT.items():
        for split in (TRAIN, HELD_OUT):
            if (name := f"{kind}-{split}.jsonl") not in rows:
                continue
            path = json.dumps(str(folder / name), ensure_ascii=False)
            sources = f"sources: [{{path: {path}, format: {row_format}}}]"
            if split == TRAIN:
                yield f"# in a stage with kind: {STAGE_KIND[kind]}"
                yield f"data: {{{sources}}}"
            else:
                yield "# in evaluation: sets:"
                yield f"{kind}: {{kind: {STAGE_KIND[kind]}, {sources}}}"
