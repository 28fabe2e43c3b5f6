"""What a run achieved, as plain text for the terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from dtrain.core.run_dir import HTML_REPORT
from dtrain.monitoring.formatting import loss_text, tone
from dtrain.monitoring.run_record import Losses, Record, read_record

WIDTH = 100


def summary(run: Path) -> str:
    """What got better, as plain text for the terminal."""
    record = read_record(run)
    parts = [_loss_table(record), *_answer_blocks(record), _places(record)]
    return "\n\n".join(part for part in parts if part)


def _loss_table(record: Record) -> str:
    """Held-out losses by set and model, with the change from the base to the last."""
    if not record.losses:
        return "No held-out losses were measured."
    after = [f"after {name}" if i else name for i, name in enumerate(record.models)]
    rows = [["held-out loss", *after, "change", ""]]
    for losses in record.losses:
        values = [loss_text(losses.values.get(model)) for model in record.models]
        rows.append([losses.name, *values, *_change(losses)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(_row(row, widths) for row in rows)


def _change(losses: Losses) -> tuple[str, str]:
    if losses.change is None or losses.percent is None:
        return "—", ""
    return f"{losses.change:+.3f} ({losses.percent:+.1f} %)", tone(losses.change)


def _row(cells: list[str], widths: list[int]) -> str:
    first, *middle, last = (
        cell.ljust(w) if i in (0, len(cells) - 1) else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "   ".join([first, *middle, last]).rstrip()


def _answer_blocks(record: Record) -> list[str]:
    return [_answer_block(i, answer) for i, answer in enumerate(record.answers, 1)]


def _answer_block(number: int, answer: dict[str, Any]) -> str:
    says = [("documented", "reference"), ("base", "base"), ("final", "final")]
    lines = [_filled(f"{number}. ", str(answer.get("question", "")))]
    lines += [_filled(f"   {label:<11} ", str(answer.get(key) or "—")) for label, key in says]
    return "\n".join(lines)


def _filled(label: str, text: str) -> str:
    """`text` on lines of limited width, hanging under its label; control characters go."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.fill(
        " ".join(plain.split()), WIDTH, initial_indent=label, subsequent_indent=" " * len(label)
    )


def _places(record: Record) -> str:
    places = [("merged model", record.merged), ("report", HTML_REPORT)]
    return "\n".join(f"{name:<14} {record.folder / place}" for name, place in places if place)
