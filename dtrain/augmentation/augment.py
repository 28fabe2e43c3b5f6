"""Augmentation: rows → requests → replies, kept as they come → made rows, filtered and labelled.

FOLDER/settings.json   what was asked of whom, under a hash; another question wants another folder
FOLDER/replies.jsonl   a line for each reply, in the order in which they came, and for each failure
                       that was paid for
FOLDER/made.jsonl      the rows made of them, in the order of the source, each with its `made_by`
FOLDER/refused.jsonl   replies that make no good row, with the reason
FOLDER/augment.json    counts and cost
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain.augmentation.budget import Limits
from dtrain.augmentation.endpoint import Endpoint
from dtrain.augmentation.prompts import How, Row, request, unfit
from dtrain.augmentation.reply_filter import Made, judged
from dtrain.augmentation.request_pool import Asker, Journal
from dtrain.core.errors import UserError
from dtrain.core.files import read_sealed, write_atomic, write_json, write_sealed
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.locks import FolderLock
from dtrain.core.log import progress, say
from dtrain.data.records import Record
from dtrain.data_quality.clean import as_row
from dtrain.data_quality.scan import Input

SETTINGS, REPLIES, MADE, REFUSED = "settings.json", "replies.jsonl", "made.jsonl", "refused.jsonl"
SUMMARY = "augment.json"
TAKES = (
    "rewrite takes all that have an instruction, pairs and tools too; answers and backtranslate "
    "take conversations without tools, and backtranslate texts"
)


@dataclass(frozen=True)
class Task:
    """What to make, of what, how often.

    Attributes:
        source: rows to begin with; those that cannot be read are left alone.
        copies: replies wanted to each row.
        at_once: requests under way at most.
        first_rows: ask for so many from the head of the source; None for all.
    """

    source: Input
    how: How
    copies: int = 1
    at_once: int = 8
    first_rows: int | None = None

    def rows(self) -> Iterator[Row]:
        """All rows that can be read."""
        readable = (item for item in self.source.rows() if isinstance(item, Record))
        for number, item in enumerate(readable):
            place = self.source.parts[item.file_index].location(item.row_number)
            yield Row(number, place, item.value)

    def asked(self) -> Iterator[Row]:
        """The rows that something is made of."""
        chosen = islice(self.rows(), self.first_rows)
        return (row for row in chosen if request(row.value, self.how))


def augment(task: Task, endpoint: Endpoint, limits: Limits, folder: Path) -> dict[str, Any]:
    """Ask for what is not there yet, then write the rows made of all replies.

    Returns:
        What augment.json holds.

    Raises:
        UserError: the folder cannot be made, belongs to another task or is in use, or the
            endpoint fails; the replies that came are kept, and the same call goes on from them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be a folder: {error.strerror}"
        raise UserError(what, where=str(folder), fix="choose another --out") from error
    lock = FolderLock(folder)
    if not lock.acquire():
        raise UserError("is in use", where=str(folder), fix=f"wait for {lock.holder()}")
    journal = None
    try:
        _settle_settings(task, endpoint, folder)
        journal = Journal(folder / REPLIES)
        asker = _ask(task, endpoint, limits, journal)
        summary = _write(task, endpoint.model, journal, folder) | _told(asker, limits)
        write_json(folder / SUMMARY, summary)
    finally:
        if journal:
            journal.close()
        lock.release()
    if asker.fault:
        raise asker.fault
    return summary


def _settle_settings(task: Task, endpoint: Endpoint, folder: Path) -> None:
    """Replies to another question must not be mixed with these."""
    settings = {
        "source": fingerprint([part.identity for part in task.source.parts]),
        "format": task.source.form,
        **({"columns": task.source.columns} if task.source.columns else {}),
        "how": task.how,
        "model": endpoint.model,
        "temperature": endpoint.temperature,
        "reply_tokens": endpoint.max_tokens,
    }
    path = folder / SETTINGS
    if not path.exists() and not (folder / REPLIES).exists():
        write_sealed(path, settings)
        return
    known = read_sealed(path)
    if changed := [name for name, value in settings.items() if known.get(name) != value]:
        what = f"was begun with another {', '.join(changed)}"
        raise UserError(what, where=str(folder), fix="choose another --out, or go back to that")


def _ask(task: Task, endpoint: Endpoint, limits: Limits, journal: Journal) -> Asker:
    total = task.copies * _count(task)
    with progress("asking", total, min(len(journal.done), total)) as meter:
        asker = Asker(endpoint, limits, journal, meter)
        asyncio.run(asker.run(task.asked(), task.how, task.copies, task.at_once))
    return asker


def _count(task: Task) -> int:
    """Rows that something is made of; what is left out is told."""
    reasons = Counter(unfit(row.value, task.how) for row in islice(task.rows(), task.first_rows))
    count = reasons.pop("", 0)
    left = ", ".join(f"{number:,} ({reason})" for reason, number in reasons.most_common())
    if not count:
        what = f"no row that `--how {task.how}` makes anything of: {left or 'it is empty'}"
        fix = f"{TAKES}; `dtrain data show {task.source.name}` shows what is in it"
        raise UserError(what, where=task.source.name, fix=fix)
    if left:
        say(f"{task.source.name}: rows that `--how {task.how}` leaves out: {left}")
    return count


def _write(task: Task, model: str, journal: Journal, folder: Path) -> dict[str, Any]:
    """The made rows and the refused replies; all of them every time, so the same for any order."""
    replies: dict[int, dict[int, tuple[str, str]]] = {}
    for line in journal.replies():
        replies.setdefault(line["row"], {})[line["copy"]] = (line["text"], line["finish"])
    good: list[str] = []
    bad: list[str] = []
    counts: Counter[str] = Counter()
    for one in judged(task.rows(), replies, task.how):
        counts[one.reason or "made"] += 1
        (bad if one.reason else good).append(_line(one, model, task.how))
    task.source.check_unchanged()
    write_atomic(folder / MADE, "".join(good))
    write_atomic(folder / REFUSED, "".join(bad))
    sums = {name: file_hash(folder / name) for name in (MADE, REFUSED)}
    return {"counts": dict(sorted(counts.items())), "blake3": sums}


def _line(one: Made, model: str, how: How) -> str:
    row = as_row(one.row.value) | {
        "made_by": {"model": model, "how": how, "from": one.row.place, "copy": one.copy}
    }
    told = {"reason": one.reason, "note": one.note, "row": row} if one.reason else row
    return json.dumps(told, ensure_ascii=False) + "\n"


def _told(asker: Asker, limits: Limits) -> dict[str, Any]:
    spent = asker.budget.spent
    return {
        "spent": asdict(spent),
        "cost": round(limits.price(spent), 6),
        "limit_reached": asker.budget.exhausted,
        "failed": asker.failed,
        "failures": asker.notes,
    }
