"""Rows of preference stages, of many lengths."""

from __future__ import annotations

from typing import Any


def preference_rows(kind: str, count: int) -> list[dict[str, Any]]:
    """Rows for a stage of this kind: prompts with a chosen and a rejected answer each, or for kto
    with one of the two and its label."""
    pairs = [
        {
            "prompt": f"What is number {n}{' in words' * (n % 4)}?",
            "chosen": f"It is {n} {'and more ' * (n % 5)}",
            "rejected": "I do not know " * (1 + n % 3),
        }
        for n in range(count)
    ]
    if kind != "kto":
        return pairs
    names = ["chosen" if n % 3 else "rejected" for n in range(count)]
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair, name in zip(pairs, names, strict=True)
    ]
