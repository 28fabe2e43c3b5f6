"""The shipped recipes: YAML files in this folder."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Name → file of every shipped recipe, sorted by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def summary(path: Path) -> str:
    """The purpose of a recipe: the first sentence of the comment at its start."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".")
