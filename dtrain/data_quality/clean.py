"""Clean scanned rows by a policy: keep, mask, quarantine or drop; every removed row is listed.

FOLDER/rows-1.jsonl …    the remaining rows of each source, in order, as messages or texts
FOLDER/quarantine.jsonl  one line per removed row: reasons, location, and the row itself if the
                         policy says quarantine; a dropped row is not copied
FOLDER/clean.json        policy, counts, and a fingerprint of the output
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from dtrain.config.data import Clean
from dtrain.core.errors import UserError
from dtrain.core.files import atomic_folder, json_line, write_json
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.data.conversations import Conversation, Preference
from dtrain.data.formats import ORIGIN, RowContent, to_row
from dtrain.data.records import BadRecord, Record
from dtrain.data_quality.finding_types import BROKEN, FLAG_BITS
from dtrain.data_quality.pii import PII_KINDS, mask_pii
from dtrain.data_quality.scan_result import ScanResult

KEEP, MASK, QUARANTINE, DROP = "keep", "mask", "quarantine", "drop"
ACTIONS = (KEEP, MASK, QUARANTINE, DROP)  # in ascending order; a row gets the strongest one
QUARANTINE_FILE, SUMMARY_FILE = "quarantine.jsonl", "clean.json"


def clean(result: ScanResult, policy: Clean, folder: Path) -> dict[str, Any]:
    """Write the rows that a policy keeps, and list those that it removes.

    Args:
        result: a scan of the same sources, which are read once more.
        policy: the action for each kind of finding.
        folder: output; it must not exist.

    Returns:
        The content of clean.json.

    Raises:
        UserError: the folder exists, a source has changed, or a row is unreadable under
            `broken: stop`.
    """
    actions = policy_actions(policy)
    counts: Counter[str] = Counter()
    with atomic_folder(folder) as work:
        names = [f"rows-{number}.jsonl" for number, _ in enumerate(result.sources, start=1)]
        with ExitStack() as stack:
            outputs = [stack.enter_context(_create(work / name)) for name in names]
            quarantine = stack.enter_context(_create(work / QUARANTINE_FILE))
            for source, location, item, kinds in _read_with_findings(result):
                if isinstance(item, BadRecord) and actions[BROKEN] == "stop":
                    fix = "fix it, or set clean.broken: quarantine"
                    raise UserError(item.error.message, where=item.error.where, fix=fix)
                action, reasons = choose_action(kinds, actions)
                counts.update([action, *reasons])
                if action in (KEEP, MASK) and isinstance(item, Record):
                    value = mask_value(item.value) if action == MASK else item.value
                    outputs[source].write(json_line(to_row(value) | _origin(item)))
                else:
                    quarantine.write(json_line(_removal(action, reasons, location, item)))
        for source_rows in result.sources:
            source_rows.check_unchanged()
        if sum(counts[action] for action in ACTIONS) != result.rows + counts[BROKEN]:
            raise UserError("the rows changed during cleaning", where=str(folder))
        hashes = {name: file_hash(work / name) for name in (*names, QUARANTINE_FILE)}
        summary = {
            "policy": policy.model_dump(),
            "counts": dict(sorted(counts.items())),
            "sources": {n: s.name for n, s in zip(names, result.sources, strict=True)},
            "blake3": hashes,
            "fingerprint": fingerprint(hashes),
        }
        write_json(work / SUMMARY_FILE, summary)
    return summary


def policy_actions(policy: Clean) -> dict[str, str]:
    """The action for each kind of finding."""
    actions = {kind: str(getattr(policy, kind, KEEP)) for kind in (*FLAG_BITS, BROKEN)}
    return actions | dict.fromkeys(PII_KINDS, policy.personal)


def choose_action(kinds: Iterable[str], actions: dict[str, str]) -> tuple[str, list[str]]:
    """The strongest action for a row with these findings, and the findings that call for one."""
    reasons = [kind for kind in kinds if actions[kind] != KEEP]
    return max((actions[kind] for kind in reasons), key=ACTIONS.index, default=KEEP), reasons


def _create(path: Path) -> IO[str]:
    return open(path, "x", encoding="utf-8", newline="\n")


def _read_with_findings(
    result: ScanResult,
) -> Iterator[tuple[int, str, Record | BadRecord, list[str]]]:
    """Yield every row again: the index of its source, its location, itself, and its findings."""
    row = 0
    for index, source in enumerate(result.sources):
        for item in source.rows():
            location = source.location(item)
            if isinstance(item, BadRecord):
                yield index, location, item, [BROKEN]
                continue
            if row >= result.rows or result.location(row) != location:
                raise UserError("the source changed since the scan", where=location)
            flags = int(result.flags[row])
            yield index, location, item, [kind for kind, bit in FLAG_BITS.items() if flags & bit]
            row += 1


def _removal(
    action: str, reasons: list[str], location: str, item: Record | BadRecord
) -> dict[str, Any]:
    """A line of the quarantine file."""
    line: dict[str, Any] = {"reasons": reasons, "action": action, "location": location}
    if isinstance(item, BadRecord):
        line["error"] = item.error.message
        return line
    if action == QUARANTINE:
        line["row"] = to_row(item.value)
    return line | _origin(item)


def _origin(record: Record) -> dict[str, str]:
    return {ORIGIN: record.origin} if record.origin else {}


def mask_value(value: RowContent) -> RowContent:
    """A row with its personal data masked."""
    if isinstance(value, str):
        return mask_pii(value)
    if isinstance(value, Conversation):
        return Conversation(_mask_texts(value.messages), value.tools)
    sides = (
        side and Conversation(_mask_texts(side.messages), side.tools)
        for side in (value.chosen, value.rejected)
    )
    return Preference(*sides)


def _mask_texts(value: Any) -> Any:
    """Mask every text in messages, whatever its key."""
    if isinstance(value, str):
        return mask_pii(value)
    if isinstance(value, dict):
        return {key: _mask_texts(item) for key, item in value.items()}
    return [_mask_texts(item) for item in value] if isinstance(value, list) else value
