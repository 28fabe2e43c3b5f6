"""What the shell offers for a word of a command line: shipped recipes, files, keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dtrain.recipes import shipped

RECIPE_SUFFIXES = (".yaml", ".yml")


def recipe_addresses(incomplete: str) -> Iterator[str]:
    """Shipped recipes, and the recipes and folders that begin so."""
    yield from (name for name in shipped() if name.startswith(incomplete))
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    prefix = incomplete[: len(incomplete) - len(Path(incomplete).name)]
    prefix = incomplete if incomplete.endswith("/") else prefix
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = f"{prefix}{path.name}"
        if name.startswith(incomplete) and (path.suffix in RECIPE_SUFFIXES or path.is_dir()):
            yield f"{name}/" if path.is_dir() else name


def shipped_names(incomplete: str) -> Iterator[str]:
    """Shipped recipes."""
    yield from (name for name in shipped() if name.startswith(incomplete))


def overrides(incomplete: str) -> Iterator[str]:
    """Keys of a recipe with an equals sign; those of a stage with the name that was typed."""
    from dtrain.config.schema_paths import key_owners

    words = incomplete.split(".")
    stage = words[1] if words[0] == "stages" and len(words) > 2 else "NAME"
    for path in key_owners():
        key = path.replace("stages[]", f"stages.{stage}")
        if "[]" not in key and key.startswith(incomplete):
            yield f"{key}="
