"""A run folder inside the data: the next start would read the run's own files as rows."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from dtrain.config.clash import Clash
from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import Key
from dtrain.core.cache_paths import SAMPLE_PREFIX, local_path
from dtrain.core.run_dir import RunDir


def check_run_folder(recipe: Recipe) -> Iterator[Clash]:
    """Sources whose folder or glob covers files that the run writes. No file is looked at."""
    run = RunDir(_real(Path(recipe.output.folder).expanduser()))
    written = run.data_like_files([stage.name for stage in recipe.stages])
    for key, address in _addresses(recipe):
        if "://" in address or address.startswith(SAMPLE_PREFIX):
            continue
        path = _real(local_path(address))
        if (file := next((file for file in written if _covers(path, file)), None)) is not None:
            message = f"the run would write its own {file.relative_to(run.path)} into this data"
            fix = "choose an output.folder outside of the data, or a narrower path"
            yield Clash([key, ("output", "folder")], message, fix)


def _addresses(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """The key and the path of everything that is read as rows."""
    for number, stage in enumerate(recipe.stages):
        for source in stage.data.all_sources:
            yield ("stages", number, "data", "sources"), source.path
    for name, data in recipe.evaluation.sets.items():
        for source in data.all_sources:
            yield ("evaluation", "sets", name, "sources"), source.path
    for name, prompts in recipe.evaluation.generation.items():
        yield ("evaluation", "generation", name, "path"), prompts.path


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _covers(path: Path, file: Path) -> bool:
    """Whether a source's path, a folder or a glob, leads to a file."""
    if not glob.has_magic(str(path)):
        is_visible = not any(p.startswith(".") for p in file.parts[len(path.parts) :])
        return file.is_relative_to(path) and is_visible
    return _matches(path.parts, file.parts)


def _matches(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether `glob.glob(pattern, recursive=True)` finds a path of these parts."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    head, *rest = pattern
    is_hidden = parts[0].startswith(".")
    if head == "**":
        return _matches(rest, parts) or (not is_hidden and _matches(pattern, parts[1:]))
    fits = fnmatchcase(parts[0], head) and (head.startswith(".") or not is_hidden)
    return fits and _matches(rest, parts[1:])
