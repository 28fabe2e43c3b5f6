"""Augmentation: rows → requests → replies, journaled as they arrive → generated rows, filtered.

FOLDER/settings.json    the settings, sealed with a hash; other settings need another folder
FOLDER/replies.jsonl    a line per reply in order of arrival, and per failure that consumed tokens
FOLDER/generated.jsonl  the accepted rows in the order of the source, each with its `generated_by`
FOLDER/rejected.jsonl   the rejected replies with the reason
FOLDER/augment.json     counts and cost
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain.augmentation.endpoint import Endpoint
from dtrain.augmentation.prompts import Mode, SourceRow, build_prompt, unsupported_reason
from dtrain.augmentation.reply_filter import GeneratedRow, Replies, filter_replies
from dtrain.augmentation.request_pool import Journal, Request, RequestPool, SpendingLimits
from dtrain.core.errors import UserError
from dtrain.core.files import json_line, read_sealed, write_atomic, write_json, write_sealed
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.locks import FolderLock
from dtrain.core.log import progress, say
from dtrain.data.formats import to_row
from dtrain.data.records import Record, SourceRows

SETTINGS_FILE, REPLIES_FILE, SUMMARY_FILE = "settings.json", "replies.jsonl", "augment.json"
GENERATED_FILE, REJECTED_FILE = "generated.jsonl", "rejected.jsonl"
MODE_INPUTS = (
    "rewrite needs rows with an instruction, preferences and tool calls included; answers and "
    "backtranslate need conversations without tools; backtranslate also takes texts"
)


@dataclass(frozen=True)
class AugmentationTask:
    """What to generate, from which rows, and how often.

    Attributes:
        source: the original rows; unreadable ones are skipped.
        mode: what to request for each row.
        copies: replies to each row.
        concurrency: maximum number of pending requests.
        first_rows: use only this many rows from the start of the source; None for all.
    """

    source: SourceRows
    mode: Mode
    copies: int = 1
    concurrency: int = 8
    first_rows: int | None = None

    def rows(self) -> Iterator[SourceRow]:
        """All readable rows."""
        readable = (item for item in self.source.rows() if isinstance(item, Record))
        for index, item in enumerate(readable):
            yield SourceRow(index, self.source.location(item), item.value)

    def requests(self) -> Iterator[Request]:
        """What is sent to the model."""
        for row in islice(self.rows(), self.first_rows):
            if messages := build_prompt(row.value, self.mode):
                for copy in range(self.copies):
                    yield Request((row.index, copy), row.location, messages, seed=copy)


def augment(
    task: AugmentationTask, endpoint: Endpoint, limits: SpendingLimits, folder: Path
) -> dict[str, Any]:
    """Request the missing replies, then write the rows that all replies make.

    Returns:
        The content of augment.json.

    Raises:
        UserError: the folder cannot be created, belongs to another task or is in use, or the
            endpoint fails. Replies that arrived are kept, and the same call continues from them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot be created: {error.strerror}"
        raise UserError(message, where=str(folder), fix="choose another --out") from error
    lock = FolderLock(folder)
    if not lock.acquire():
        raise UserError("is in use", where=str(folder), fix=f"wait for {lock.holder()}")
    journal = None
    try:
        _check_settings(task, endpoint, folder)
        journal = Journal(folder / REPLIES_FILE, {"row": int, "copy": int})
        pool = _request_replies(task, endpoint, limits, journal)
        summary = _write_rows(task, endpoint.model, journal, folder) | _usage_summary(pool, limits)
        write_json(folder / SUMMARY_FILE, summary)
    finally:
        if journal:
            journal.close()
        lock.release()
    if pool.error:
        raise pool.error
    return summary


def _check_settings(task: AugmentationTask, endpoint: Endpoint, folder: Path) -> None:
    """Record the settings, or compare them: replies to other prompts must not be mixed in."""
    settings = {
        "source": fingerprint([file.identity for file in task.source.files]),
        "format": task.source.row_format,
        **({"columns": task.source.columns} if task.source.columns else {}),
        "how": task.mode,
        "model": endpoint.model,
        "temperature": endpoint.temperature,
        "reply_tokens": endpoint.max_tokens,
    }
    path = folder / SETTINGS_FILE
    if not path.exists() and not (folder / REPLIES_FILE).exists():
        write_sealed(path, settings)
        return
    recorded = read_sealed(path)
    if changed := [name for name, value in settings.items() if recorded.get(name) != value]:
        message = f"was started with a different {', '.join(changed)}"
        fix = "choose another --out, or restore the settings"
        raise UserError(message, where=str(folder), fix=fix)


def _request_replies(
    task: AugmentationTask, endpoint: Endpoint, limits: SpendingLimits, journal: Journal
) -> RequestPool:
    total = task.copies * _count_usable_rows(task)
    with progress("requesting", total, min(len(journal.done), total)) as meter:
        pool = RequestPool(endpoint, limits, journal, meter)
        asyncio.run(pool.run(task.requests(), task.concurrency))
    return pool


def _count_usable_rows(task: AugmentationTask) -> int:
    """The number of rows that the mode can use; prints how many it skips, and why."""
    rows = islice(task.rows(), task.first_rows)
    reasons = Counter(unsupported_reason(row.value, task.mode) for row in rows)
    usable = reasons.pop("", 0)
    skipped = ", ".join(f"{count:,} ({reason})" for reason, count in reasons.most_common())
    if not usable:
        message = f"no row that `--how {task.mode}` can use: {skipped or 'it is empty'}"
        fix = f"{MODE_INPUTS}; `dtrain data show {task.source.name}` prints the rows"
        raise UserError(message, where=task.source.name, fix=fix)
    if skipped:
        say(f"{task.source.name}: rows that `--how {task.mode}` skips: {skipped}")
    return usable


def _write_rows(
    task: AugmentationTask, model: str, journal: Journal, folder: Path
) -> dict[str, Any]:
    """Write all accepted and rejected rows on every run, so the output has a fixed order."""
    replies: Replies = {}
    for line in journal.replies():
        replies.setdefault(line["row"], {})[line["copy"]] = (line["text"], line["finish"])
    accepted: list[str] = []
    rejected: list[str] = []
    counts: Counter[str] = Counter()
    for generated in filter_replies(task.rows(), replies, task.mode):
        counts[generated.reason or "generated"] += 1
        lines = rejected if generated.reason else accepted
        lines.append(_row_line(generated, model, task.mode))
    task.source.check_unchanged()
    write_atomic(folder / GENERATED_FILE, "".join(accepted))
    write_atomic(folder / REJECTED_FILE, "".join(rejected))
    hashes = {name: file_hash(folder / name) for name in (GENERATED_FILE, REJECTED_FILE)}
    return {"counts": dict(sorted(counts.items())), "blake3": hashes}


def _row_line(generated: GeneratedRow, model: str, mode: Mode) -> str:
    origin = {"model": model, "how": mode, "from": generated.row.location, "copy": generated.copy}
    line: dict[str, Any] = to_row(generated.row.value) | {"generated_by": origin}
    if generated.reason:
        line = {"reason": generated.reason, "note": generated.note, "row": line}
    return json_line(line)


def _usage_summary(pool: RequestPool, limits: SpendingLimits) -> dict[str, Any]:
    spent = pool.budget.spent
    return {
        "spent": asdict(spent),
        "cost": round(limits.price(spent), 6),
        "limit_reached": pool.budget.exhausted,
        "failed": pool.failed,
        "failures": pool.failure_notes,
    }
