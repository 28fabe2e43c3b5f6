"""What each source of a mixture gave to a stage, and how its own training loss went."""

from __future__ import annotations

from typing import Any

from dtrain.core.units import count

Lines = list[dict[str, Any]]


def source_rows(lines: Lines) -> list[dict[str, Any]]:
    """A row for each of several sources, from a stage's metrics.

    Its loss is the mean over its supervised tokens in the first and in the last tenth of the steps.
    """
    steps = [line["sources"] for line in lines if isinstance(line.get("sources"), dict)]
    tenth = -(-len(steps) // 10)
    names = dict.fromkeys(name for step in steps for name in step)
    return [
        {
            "name": name,
            "sequences": count(_sum(steps, name, "sequences")),
            "tokens": count(_sum(steps, name, "tokens")),
            "first": _loss(steps[:tenth], name),
            "last": _loss(steps[-tenth:], name),
        }
        for name in names
    ]


def _sum(steps: Lines, name: str, key: str) -> int:
    return sum(step.get(name, {}).get(key) or 0 for step in steps)


def _loss(steps: Lines, name: str) -> float | None:
    known = [step[name] for step in steps if (step.get(name) or {}).get("loss") is not None]
    targets = sum(source["supervised_tokens"] for source in known)
    total = sum(source["loss"] * source["supervised_tokens"] for source in known)
    return total / targets if targets else None
