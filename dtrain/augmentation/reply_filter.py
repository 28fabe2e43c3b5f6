"""Which replies make a row worth training on, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dtrain.augmentation.near_duplicates import NONE, Likeness
from dtrain.augmentation.prompts import How, Row, cleaned, made, side
from dtrain.data.conversations import Preference
from dtrain.data_quality import text_checks
from dtrain.data_quality.sample import Sample, sample_of

UNWANTED = {
    text_checks.EMPTY,
    text_checks.SAME,
    text_checks.GARBLED,
    text_checks.REPEATED,
    text_checks.REFUSAL,
    text_checks.CUT_OFF,
}


@dataclass(frozen=True)
class Made:
    """A row that a reply made, and what is wrong with it, if anything.

    Attributes:
        row: it was made from, with the new value.
        copy: number of the reply.
        reason: a kind of finding, or ''.
        note: more about it.
    """

    row: Row
    copy: int
    reason: str = ""
    note: str = ""


def judged(
    source: Iterable[Row], replies: dict[int, dict[int, tuple[str, str]]], how: How
) -> Iterator[Made]:
    """All made rows, in the order of the source and of the copies.

    Args:
        source: all its rows, in order.
        replies: row → copy → (text, why the model stopped).
    """
    seen, places = Likeness(), []
    rows: list[Made] = []
    for row in source:
        if own := side(row, how):
            seen.add_one(*own)
            places.append(row.place)
        for copy, (text, finish) in sorted(replies.get(row.number, {}).items()):
            new = replace(row, value=made(row.value, how, text))
            rows.append(Made(new, copy, *_fault(new, cleaned(text, how), finish)))
    for one in rows:
        if not one.reason and (own := side(one.row, how)):
            seen.add_one(*own)
            places.append(f"made from {one.row.place}")
    yield from _first_of_each(rows, seen, places, how)


def _first_of_each(rows: list[Made], seen: Likeness, places: list[str], how: How) -> Iterator[Made]:
    earlier, alike = seen.earlier()
    number = len(earlier) - sum(1 for one in rows if not one.reason and side(one.row, how))
    for one in rows:
        if one.reason or not side(one.row, how):
            yield one
            continue
        if earlier[number] == NONE:
            yield one
        else:
            same = alike[number] == 1
            note = f"{alike[number]:.0%} like {places[int(earlier[number])]}"
            yield replace(one, reason="exact_duplicate" if same else "near_duplicate", note=note)
        number += 1


def _fault(row: Row, said: str, finish: str) -> tuple[str, str]:
    if finish == "length":
        return text_checks.CUT_OFF, "the reply reached its greatest length"
    only_bad = (
        isinstance(row.value, Preference) and row.value.chosen is None
    )  # it is bad on purpose
    for kind, note, _ in text_checks.faults(sample_of(row.value)):
        if kind in ({text_checks.EMPTY} if only_bad else UNWANTED):
            return kind, note
    for kind, note, _ in text_checks.faults(Sample("?", said)):
        if kind == text_checks.REFUSAL:  # of a model that was asked for an instruction
            return kind, note
    return "", ""
