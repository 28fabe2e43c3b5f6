"""Cleaning by a policy: rows stay, are masked, or go; whatever goes is told, with its source line.

FOLDER/rows-1.jsonl …    what stays of each source, in its order, as messages or texts
FOLDER/quarantine.jsonl  a line for each row that went: reasons, place, and the row itself where
                         the policy says quarantine; where it says drop, the row is not copied
FOLDER/clean.json        policy, counts, and the fingerprint of all of it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from dtrain.config.schema import Clean
from dtrain.core.errors import UserError
from dtrain.core.files import atomic_folder, write_json
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.data.conversations import Conversation, Preference, messages_to_row
from dtrain.data.formats import RowContent
from dtrain.data.records import BadRecord, Record
from dtrain.data_quality.finding_types import BIT, BROKEN
from dtrain.data_quality.pii import KINDS as PERSONAL
from dtrain.data_quality.pii import mask
from dtrain.data_quality.scan import Findings

KEEP, MASK, QUARANTINE, DROP = "keep", "mask", "quarantine", "drop"
STRENGTH = (KEEP, MASK, QUARANTINE, DROP)  # the strongest of a row's reasons is carried out
QUARANTINED, SUMMARY = "quarantine.jsonl", "clean.json"


def clean(found: Findings, policy: Clean, folder: Path) -> dict[str, Any]:
    """Write what a policy leaves of the scanned rows, and what it takes away.

    Args:
        found: a scan of the same sources; they are read once more.
        policy: what to do for which reason.
        folder: made; it must not be there yet.

    Returns:
        What clean.json holds.

    Raises:
        UserError: the folder is there, a source has changed, or a broken row under
            `broken: stop`.
    """
    what = actions(policy)
    counts: Counter[str] = Counter()
    with atomic_folder(folder) as work:
        names = [f"rows-{number + 1}.jsonl" for number in range(len(found.inputs))]
        with ExitStack() as stack:
            files = [stack.enter_context(_new(work / name)) for name in names]
            away = stack.enter_context(_new(work / QUARANTINED))
            for source, place, item, reasons in _rows(found):
                _one(source, place, item, reasons, what, files, away, counts)
        for one in found.inputs:
            one.check_unchanged()
        if sum(counts[action] for action in STRENGTH) != found.rows + counts[BROKEN]:
            raise UserError("the rows changed while they were cleaned", where=str(folder))
        sums = {name: file_hash(work / name) for name in (*names, QUARANTINED)}
        summary = {
            "policy": policy.model_dump(),
            "counts": dict(sorted(counts.items())),
            "sources": {n: i.name for n, i in zip(names, found.inputs, strict=True)},
            "blake3": sums,
            "fingerprint": fingerprint(sums),
        }
        write_json(work / SUMMARY, summary)
    return summary


def actions(policy: Clean) -> dict[str, str]:
    """What to do for each kind of finding."""
    own = {kind: str(getattr(policy, kind, KEEP)) for kind in (*BIT, BROKEN)}
    return own | {kind: policy.personal for kind in PERSONAL}


def _new(path: Path) -> IO[str]:
    return open(path, "x", encoding="utf-8", newline="\n")


def _rows(found: Findings) -> Iterator[tuple[int, str, Record | BadRecord, list[str]]]:
    """Every row again: its source, its place, itself, and what was found in it."""
    row = 0
    for source, one in enumerate(found.inputs):
        for item in one.rows():
            place = one.parts[item.file_index].location(item.row_number)
            if isinstance(item, BadRecord):
                yield source, place, item, [BROKEN]
                continue
            if row >= found.rows or found.place(row) != place:
                raise UserError("the source changed since it was scanned", where=place)
            flags = int(found.flags[row])
            yield source, place, item, [kind for kind, bit in BIT.items() if flags & bit]
            row += 1


def _one(
    source: int,
    place: str,
    item: Record | BadRecord,
    reasons: list[str],
    what: dict[str, str],
    files: list[IO[str]],
    away: IO[str],
    counts: Counter[str],
) -> None:
    if isinstance(item, BadRecord) and what[BROKEN] == "stop":
        raise UserError(item.error.what, where=item.error.where, fix="or clean.broken: quarantine")
    telling = [reason for reason in reasons if what[reason] != KEEP]
    action = max((what[reason] for reason in telling), key=STRENGTH.index, default=KEEP)
    counts.update([action, *telling])
    if action in (KEEP, MASK) and isinstance(item, Record):
        value = masked(item.value) if action == MASK else item.value
        files[source].write(_line(as_row(value)))
        return
    note: dict[str, Any] = {"reasons": telling, "action": action, "place": place}
    if isinstance(item, BadRecord):
        note["fault"] = item.error.what
    elif action == QUARANTINE:
        note["row"] = as_row(item.value)
    away.write(_line(note))


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def as_row(value: RowContent) -> dict[str, Any]:
    """A row in a format that reads back as the same value."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Conversation):
        return {"messages": messages_to_row(value.messages), **_tools(value)}
    if value.chosen and value.rejected:
        sides = {"chosen": value.chosen, "rejected": value.rejected}
        rows = {name: messages_to_row(side.messages) for name, side in sides.items()}
        return {**rows, **_tools(value.chosen)}
    talk = value.chosen or value.rejected
    assert talk is not None
    label = value.chosen is not None
    return {"messages": messages_to_row(talk.messages), "label": label, **_tools(talk)}


def _tools(talk: Conversation) -> dict[str, Any]:
    return {"tools": talk.tools} if talk.tools else {}


def masked(value: RowContent) -> RowContent:
    """The row without its personal data."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Conversation):
        return Conversation(_masked(value.messages), value.tools)
    sides = (
        talk and Conversation(_masked(talk.messages), talk.tools)
        for talk in (value.chosen, value.rejected)
    )
    return Preference(*sides)


def _masked(value: Any) -> Any:
    """Every text inside of messages, whatever its key; roles have nothing to mask."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {key: _masked(inner) for key, inner in value.items()}
    return [_masked(inner) for inner in value] if isinstance(value, list) else value
