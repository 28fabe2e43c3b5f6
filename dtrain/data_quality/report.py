"""The report of a scan: JSON values, tables for the terminal, and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dtrain.core.files import write_atomic
from dtrain.core.hashes import fingerprint
from dtrain.core.output import visible
from dtrain.core.units import count
from dtrain.data.assistant_spans import NO_END
from dtrain.data.conversations import Conversation
from dtrain.data.duplicates import count_distinct
from dtrain.data.records import BadRecord
from dtrain.data.text_checks import excerpt, row_text
from dtrain.data.tokenize import notes
from dtrain.data_quality import preference_checks
from dtrain.data_quality.finding_types import BROKEN, FINDING_TYPES, FLAG_BITS
from dtrain.data_quality.pii import PII_KINDS, mask_pii
from dtrain.data_quality.scan import REJECTED
from dtrain.data_quality.scan_result import ScanResult

MAX_EXAMPLES = 5  # of each kind
TERMINAL_EXAMPLES = 2
HISTOGRAM_BINS = 24
MAX_LISTED = 12  # languages, actions, openings
FEW_ROWS = 1000
MONOTONOUS_SHARE = 0.5  # share of the most common opening above which the rows are monotonous
HTML_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def build_report(result: ScanResult) -> dict[str, Any]:
    """The report of a scan as JSON values."""
    rows = {kind: int(result.has_finding(kind).sum()) for kind in FLAG_BITS}
    rows[BROKEN] = result.unreadable
    texts = _example_texts(result)
    findings = [_finding(result, kind, rows[kind], texts) for kind in FINDING_TYPES if rows[kind]]
    return {
        "rows": result.rows,
        "broken": result.unreadable,
        "sources": [
            {
                "name": source.name,
                "format": source.row_format,
                "files": len(source.files),
                "rows": result.rows_per_source[index],
            }
            for index, source in enumerate(result.sources)
        ],
        "fingerprint": fingerprint([f.identity for s in result.sources for f in s.files]),
        "sequence_length": result.sequence_length,
        "lengths": _lengths(result),
        "languages": result.languages.most_common(MAX_LISTED),
        "diversity": _diversity(result),
        "preferences": preference_checks.describe(result.preferences),
        "findings": findings,
        "verdict": _verdict(result, findings),
        "state_bytes_per_row": round(result.state_bytes() / max(result.rows, 1)),
    }


def _lengths(result: ScanResult) -> dict[str, Any]:
    """Quantiles and a histogram of the lengths, by name."""
    asked = result.column("asked")
    lengths = {
        "characters per text": ("answer_characters", ~asked),
        "characters per question": ("question_characters", asked),
        "characters per answer": ("answer_characters", asked),
    }
    if result.has_tokens:
        lengths["tokens per row"] = ("tokens", result.column("tokens") != REJECTED)
    return {
        name: _distribution(result.column(column)[rows])
        for name, (column, rows) in lengths.items()
        if rows.any()
    }


def _distribution(values: NDArray[Any]) -> dict[str, Any]:
    quantiles = np.quantile(values, [0.5, 0.9, 0.99], method="higher").astype(int).tolist()
    top = max(float(np.quantile(values, 0.995)), 1.0)
    counts, edges = np.histogram(np.minimum(values, top), bins=HISTOGRAM_BINS, range=(0, top))
    return {
        **dict(zip(("median", "p90", "p99"), quantiles, strict=True)),
        "max": int(values.max()),
        "sum": int(values.sum()),
        "histogram": {"edges": [round(edge) for edge in edges], "counts": counts.tolist()},
    }


def _diversity(result: ScanResult) -> dict[str, Any]:
    questions = int(result.column("asked").sum())
    return {
        "questions": questions,
        "distinct_openings": count_distinct(result.column("opening")) if questions else 0,
        "openings": result.openings.counter.most_common(MAX_LISTED),
        "actions": [
            [f"{action[0]} {action[1]}", times]
            for action, times in result.actions.counter.most_common(MAX_LISTED)
        ],
    }


def _finding(result: ScanResult, kind: str, rows: int, texts: dict[int, str]) -> dict[str, Any]:
    finding_type = FINDING_TYPES[kind]
    if kind == BROKEN:
        examples = [{"location": "", "note": n, "text": ""} for n in result.unreadable_notes]
    else:
        examples = [
            {
                "location": result.location(note.row),
                "note": note.text,
                "text": _example_excerpt(texts.get(note.row, ""), kind),
            }
            for note in result.notes.get(kind, [])
        ]
    return {
        "kind": kind,
        "title": finding_type.title,
        "severe": finding_type.severe,
        "advice": finding_type.advice,
        "rows": rows,
        "share": rows / max(result.rows + result.unreadable, 1),
        "examples": examples[:MAX_EXAMPLES],
    }


def _example_excerpt(text: str, kind: str) -> str:
    """The beginning of a row, masked: a report must not spread the data that it warns of."""
    return excerpt(mask_pii(text) if kind in PII_KINDS else mask_pii(text[:400]), 0, 160)


def _example_texts(result: ScanResult) -> dict[int, str]:
    """The texts of the rows that the report shows, read once more: a scan keeps none."""
    examples = {note.row for notes in result.notes.values() for note in notes[:MAX_EXAMPLES]}
    texts: dict[int, str] = {}
    row = 0
    for source in result.sources if examples else ():
        for item in source.rows():
            if isinstance(item, BadRecord):
                continue
            if row in examples:
                text = row_text(item.value)
                arrow = " → " if isinstance(item.value, Conversation) else " "
                texts[row] = f"{text.question[:400]}{arrow}{text.answer[:400]}".strip()
                if len(texts) == len(examples):
                    return texts
            row += 1
    return texts


def _verdict(result: ScanResult, findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to do, severe findings first."""
    lines = [
        _verdict_line(
            finding["severe"],
            f"{finding['title']}: {finding['rows']:,} ({finding['share']:.1%})",
            finding["advice"],
        )
        for finding in sorted(findings, key=lambda finding: not finding["severe"])
    ]
    lines += _dataset_verdict(result)
    if not any(line["severe"] for line in lines):
        text = "nothing to fix" if result.rows else "no rows to train on"
        lines.insert(0, _verdict_line(not result.rows, text))
    return lines


def _dataset_verdict(result: ScanResult) -> list[dict[str, Any]]:
    """What the rows show as a whole: template problems, too few rows, monotonous questions."""
    advice = "the `template` must write the tokenizer's end-of-text token after each answer"
    ends = {key: n for key, n in result.note_counts.items() if key == NO_END}
    rest = {key: n for key, n in result.note_counts.items() if key != NO_END}
    lines = [_verdict_line(True, note, advice) for note in notes(ends)]
    lines += [_verdict_line(False, note) for note in notes(rest)]
    preferences = preference_checks.describe(result.preferences)
    lines += [_verdict_line(*line) for line in preference_checks.verdicts(preferences)]
    asked = int(result.column("asked").sum())
    if 0 < asked < FEW_ROWS:
        advice = "about 1,000 good rows teach a style, about 10,000 a task"
        lines.append(_verdict_line(False, f"only {asked:,} rows with answers", advice))
    if asked >= 100 and result.openings.counter:
        opening, times = result.openings.counter.most_common(1)[0]
        if times / asked > MONOTONOUS_SHARE:
            text = f"{times / asked:.0%} of the questions begin with “{opening}”"
            lines.append(_verdict_line(False, text, "vary it, or the model learns the phrase"))
    return lines


def _verdict_line(severe: bool, text: str, advice: str = "") -> dict[str, Any]:
    return {"severe": severe, "text": text, "advice": advice}


def terminal_report(report: dict[str, Any]) -> Iterator[RenderableType]:
    """The report as lines and tables for the terminal."""
    for source in report["sources"]:
        yield f"{source['name']}: {source['rows']:,} rows ({source['format']})"
    if report["lengths"]:
        yield _lengths_table(report)
    yield _counts_line("languages", report["languages"])
    diversity = report["diversity"]
    if diversity["questions"]:
        questions, openings = diversity["questions"], diversity["distinct_openings"]
        yield f"{questions:,} questions with {openings:,} different openings"
        if diversity["actions"]:
            yield _counts_line("instructions", diversity["actions"])
        else:
            yield _counts_line("openings", diversity["openings"])
    if report["findings"]:
        yield _findings_table(report)
    yield Text("verdict", style="bold")
    for line in report["verdict"]:
        symbol = "✗" if line["severe"] else "·"
        advice = f" → {line['advice']}" if line["advice"] else ""
        yield Text(f"{symbol} {line['text']}{advice}", style="red" if line["severe"] else "")


def _lengths_table(report: dict[str, Any]) -> Table:
    table = Table("length", box=None, pad_edge=False)
    for name in ("median", "p90", "p99", "max", "sum"):
        table.add_column(name, justify="right")
    for name, lengths in report["lengths"].items():
        cells = [f"{lengths[key]:,}" for key in ("median", "p90", "p99", "max")]
        table.add_row(name, *cells, count(lengths["sum"]))
    return table


def _counts_line(title: str, counts: list[Any]) -> Text:
    listed = ", ".join(f"{name} {times:,}" for name, times in counts)
    return Text(f"{title}: {listed or 'none'}")


def _findings_table(report: dict[str, Any]) -> Table:
    table = Table("finding", box=None, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("most severe examples", overflow="fold")
    for finding in report["findings"]:
        examples = finding["examples"][:TERMINAL_EXAMPLES]
        cells = (
            finding["title"],
            f"{finding['rows']:,}",
            f"{finding['share']:.1%}",
            "\n".join(_without_folder(e["location"], e["note"]) for e in examples),
        )
        style = "red" if finding["severe"] else ""
        table.add_row(*(Text(visible(cell), style=style) for cell in cells))
    return table


def _without_folder(location: str, note: str) -> str:
    """Location and note of an example, without the folder of the file."""
    folder = location[: location.rfind("/") + 1]
    line = f"{location} {note}".strip()
    return line.replace(folder, "") if folder else line


def write_html(path: Path, report: dict[str, Any], title: str) -> None:
    """Write the report as one HTML page without external resources; all text is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": count, "thousands": lambda n: f"{n:,}"}
    template = environment.from_string(HTML_TEMPLATE.read_text(encoding="utf-8"))
    problems = sum(line["severe"] for line in report["verdict"])
    write_atomic(path, template.render(report=report, title=title, problems=problems) + "\n")
