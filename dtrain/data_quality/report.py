"""What a scan found, as plain values: for JSON, for the terminal, for the page."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.core.hashes import fingerprint
from dtrain.data.assistant_spans import NO_END
from dtrain.data.conversations import Conversation
from dtrain.data.records import BadRecord
from dtrain.data.tokenize import notes
from dtrain.data_quality.duplicates import distinct
from dtrain.data_quality.finding_types import BIT, BROKEN, MEANINGS
from dtrain.data_quality.pii import KINDS as PERSONAL
from dtrain.data_quality.pii import mask
from dtrain.data_quality.sample import sample_of
from dtrain.data_quality.scan import REFUSED, Findings
from dtrain.data_quality.text_checks import excerpt

EXAMPLES = 5  # of each kind
BINS = 24
MOST = 12  # languages, orders, openings that are listed
FEW_ROWS = 1000
SAMENESS = 0.5  # share of one way to begin from which on a set is monotonous


def report(found: Findings) -> dict[str, Any]:
    """Everything of a scan that is worth telling, as JSON values."""
    kinds = {kind: int(found.having(kind).sum()) for kind in MEANINGS if kind in BIT}
    kinds[BROKEN] = found.broken
    texts = _texts(found)
    findings = [_finding(found, kind, kinds[kind], texts) for kind in MEANINGS if kinds[kind]]
    return {
        "rows": found.rows,
        "broken": found.broken,
        "sources": _sources(found),
        "fingerprint": fingerprint([p.identity for i in found.inputs for p in i.parts]),
        "sequence_length": found.sequence_length,
        "lengths": _lengths(found),
        "languages": found.languages.most_common(MOST),
        "variety": _variety(found),
        "findings": findings,
        "verdict": _verdict(found, findings),
        "state_bytes_per_row": round(found.state_bytes() / max(found.rows, 1)),
    }


def _sources(found: Findings) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "format": one.form,
            "files": len(one.parts),
            "rows": found.of_source[number],
        }
        for number, one in enumerate(found.inputs)
    ]


def _lengths(found: Findings) -> dict[str, Any]:
    """Quantiles and a histogram of what has a length, by name."""
    asked = found.column("asked")
    lengths = {
        "characters of a text": ("answer_characters", ~asked),
        "characters of a question": ("question_characters", asked),
        "characters of an answer": ("answer_characters", asked),
    }
    if found.counted:
        lengths["tokens of a row"] = ("tokens", found.column("tokens") != REFUSED)
    return {
        name: _spread(found.column(column)[which])
        for name, (column, which) in lengths.items()
        if which.any()
    }


def _spread(values: NDArray[Any]) -> dict[str, Any]:
    quantiles = np.quantile(values, [0.5, 0.9, 0.99], method="higher").astype(int).tolist()
    top = max(float(np.quantile(values, 0.995)), 1.0)
    counts, edges = np.histogram(np.minimum(values, top), bins=BINS, range=(0, top))
    names = ("median", "p90", "p99")
    return {
        **dict(zip(names, quantiles, strict=True)),
        "longest": int(values.max()),
        "sum": int(values.sum()),
        "histogram": {"edges": [round(edge) for edge in edges], "counts": counts.tolist()},
    }


def _variety(found: Findings) -> dict[str, Any]:
    asked = int(found.column("asked").sum())
    return {
        "questions": asked,
        "distinct_openings": distinct(found.column("start")) if asked else 0,
        "openings": found.openings.counter.most_common(MOST),
        "orders": [
            [f"{pair[0]} {pair[1]}", count]
            for pair, count in found.orders.counter.most_common(MOST)
        ],
    }


def _finding(found: Findings, kind: str, rows: int, texts: dict[int, str]) -> dict[str, Any]:
    meaning = MEANINGS[kind]
    if kind == BROKEN:
        examples = [{"place": "", "note": note, "text": ""} for note in found.broken_notes]
    else:
        examples = [
            {"place": found.place(row), "note": note, "text": _shown(texts.get(row, ""), kind)}
            for _, row, note in found.notes.get(kind, [])
        ]
    return {
        "kind": kind,
        "title": meaning.title,
        "grave": meaning.grave,
        "advice": meaning.advice,
        "rows": rows,
        "share": rows / max(found.rows + found.broken, 1),
        "examples": examples[:EXAMPLES],
    }


def _shown(text: str, kind: str) -> str:
    """The head of a row; a report must not spread what it warns of."""
    return excerpt(mask(text) if kind in PERSONAL else mask(text[:400]), 0, 160)


def _texts(found: Findings) -> dict[int, str]:
    """The texts of the rows that are shown, read once more: a scan keeps none."""
    wanted = {row for notes in found.notes.values() for _, row, _ in notes[:EXAMPLES]}
    texts: dict[int, str] = {}
    row = 0
    for one in found.inputs if wanted else ():
        for item in one.rows():
            if isinstance(item, BadRecord):
                continue
            if row in wanted:
                sample = sample_of(item.value)
                arrow = " → " if isinstance(item.value, Conversation) else " "
                texts[row] = f"{sample.question[:400]}{arrow}{sample.answer[:400]}".strip()
                if len(texts) == len(wanted):
                    return texts
            row += 1
    return texts


def _verdict(found: Findings, findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to do, the gravest first: [{"grave", "text", "do"}]."""
    lines = [
        {
            "grave": f["grave"],
            "text": f"{f['title']}: {f['rows']:,} ({f['share']:.1%})",
            "do": f["advice"],
        }
        for f in sorted(findings, key=lambda f: not f["grave"])
    ]
    lines += _on_the_whole(found)
    if not any(line["grave"] for line in lines):
        text = "nothing that must be mended" if found.rows else "there is no row to train on"
        lines.insert(0, {"grave": not found.rows, "text": text, "do": ""})
    return lines


def _on_the_whole(found: Findings) -> list[dict[str, Any]]:
    ends = {key: n for key, n in found.rendered.items() if key == NO_END}
    rest = {key: n for key, n in found.rendered.items() if key != NO_END}
    do = "let the `template` write the tokenizer's end of text behind each answer"
    lines = [{"grave": True, "text": note, "do": do} for note in notes(ends)]
    lines += [{"grave": False, "text": note, "do": ""} for note in notes(rest)]
    asked = int(found.column("asked").sum())
    if 0 < asked < FEW_ROWS:
        text = f"{asked:,} rows with answers are few"
        lines.append(
            {"grave": False, "text": text, "do": "1,000 good ones teach a manner, 10,000 a task"}
        )
    if asked >= 100 and found.openings.counter:
        opening, count = found.openings.counter.most_common(1)[0]
        if count / asked > SAMENESS:
            text = f"{count / asked:.0%} of the questions begin with “{opening}”"
            lines.append({"grave": False, "text": text, "do": "a model learns the phrase: vary it"})
    return lines
