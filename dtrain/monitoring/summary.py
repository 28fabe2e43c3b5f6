"""A run's results as plain text for the terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from dtrain.core.run_dir import HTML_REPORT
from dtrain.monitoring.run_record import HeldOutLosses, RunRecord, read_run

WIDTH = 100
MIN_CHANGE = 0.0005  # smaller changes do not show in three decimals


def run_summary(run: Path) -> str:
    """Held-out losses, answers, and the paths of the results."""
    record = read_run(run)
    answers = [_answer_block(i, answer) for i, answer in enumerate(record.answers, start=1)]
    results = [("merged model", record.merged), ("report", HTML_REPORT)]
    paths = "\n".join(f"{name:<14} {record.folder / path}" for name, path in results if path)
    return "\n\n".join(block for block in (_loss_table(record), *answers, paths) if block)


def format_loss(value: object) -> str:
    """A loss with three decimals, or a dash if it was not measured."""
    return f"{value:.3f}" if isinstance(value, int | float) else "—"


def rate_change(change: float) -> str:
    """Rate the change of a loss as "better", "worse" or "same"."""
    if abs(change) < MIN_CHANGE:
        return "same"
    return "better" if change < 0 else "worse"


def _loss_table(record: RunRecord) -> str:
    """Held-out losses by set and model, with the change from the base model to the last."""
    if not record.losses:
        return "No held-out losses were measured."
    columns = [f"after {name}" if i else name for i, name in enumerate(record.models)]
    rows = [["held-out loss", *columns, "change", ""]]
    for losses in record.losses:
        values = [format_loss(losses.values.get(model)) for model in record.models]
        rows.append([losses.name, *values, *_change_cells(losses)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *middle, last = zip(row, widths, strict=True)
        cells = [f"{first[0]:<{first[1]}}", *(f"{cell:>{w}}" for cell, w in middle), last[0]]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def _change_cells(losses: HeldOutLosses) -> tuple[str, str]:
    if losses.change is None or losses.percent is None:
        return "—", ""
    return f"{losses.change:+.3f} ({losses.percent:+.1f} %)", rate_change(losses.change)


def _answer_block(number: int, answer: dict[str, Any]) -> str:
    labels = [("documented", "reference"), ("base", "base"), ("final", "final")]
    lines = [_wrap(f"{number}. ", str(answer.get("question", "")))]
    lines += [_wrap(f"   {label:<11} ", str(answer.get(key) or "—")) for label, key in labels]
    return "\n".join(lines)


def _wrap(label: str, text: str) -> str:
    """Wrap a text under its label; control characters are removed."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.fill(
        " ".join(plain.split()), WIDTH, initial_indent=label, subsequent_indent=" " * len(label)
    )
