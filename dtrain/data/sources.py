"""Find the files or the dataset behind a source's `path`."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtrain.config.data import Source
from dtrain.core.cache_paths import local_path, sample_folder, sample_name
from dtrain.core.errors import UserError, first_line
from dtrain.core.hash_cache import FileIdentity
from dtrain.core.hashes import fingerprint
from dtrain.core.lazy_import import LazyModule
from dtrain.core.log import progress, say
from dtrain.data.remote import fetch, is_remote

datasets: Any = LazyModule("datasets")  # it imports pandas, which takes a second

PROSE = (".txt", ".md", ".rst")  # a file is one text
TEXTUAL = (*PROSE, ".jsonl", ".json", ".csv", ".tsv")
PACKERS = (".gz", ".zst")
SUFFIXES = (*TEXTUAL, ".parquet", ".arrow")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".tar.gz", ".tar.zst", ".bz2", ".xz")
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")  # of Dataset.save_to_disk
HUB_HINT = " A data set of the hub is OWNER/NAME"
PROGRESS_FROM_BYTES = 1 << 30  # a second of hashing
# The row's number, from 1, and a function that returns the row, or a UserError.
RawRow = tuple[int, Callable[[], Any]]


@dataclass(frozen=True)
class SourceFile:
    """A file, or a split of a dataset.

    Attributes:
        name: for messages.
        kind: suffix of the file, or "dataset".
        identity: SHA-256 of the content; of a data set, a hash of its files and its selection.
        path: the file, if it is one.
        dataset: of the `datasets` library, if it is one.
        files: the files that are read, as they were when they were hashed.
    """

    name: str
    kind: str
    identity: str
    path: Path | None = None
    dataset: Any = None
    files: tuple[FileIdentity, ...] = ()

    @property
    def is_prose(self) -> bool:
        """Whether the whole file is one text, without rows."""
        return self.kind.startswith(PROSE)

    def location(self, number: int) -> str:
        """Location of row `number` (from 1): file:line, file#row; of a text, the file."""
        if self.is_prose:
            return self.name
        has_lines = self.kind.startswith((".jsonl", ".csv", ".tsv"))
        return f"{self.name}{':' if has_lines else '#'}{number}"

    def check_columns(self, names: list[str]) -> None:
        """Check that each column of the file has a name of its own; empty names may repeat.

        Raises:
            UserError: two have the same.
        """
        duplicates = [name for name in filter(None, dict.fromkeys(names)) if names.count(name) > 1]
        if duplicates:
            message = f"duplicate column `{duplicates[0]}`"
            fix = "rename or remove one of them"
            raise UserError(message, where=self.location(1), fix=fix)

    def check_unchanged(self, *, again: bool = False) -> None:
        """Check that the files are still those that were hashed (`FileIdentity.check_unchanged`).

        Raises:
            UserError: a file changed.
        """
        for file in self.files:
            file.check_unchanged(self.name if self.path else str(file.path), again=again)


def file_kind(path: Path) -> str:
    """'a/b.jsonl.gz' → '.jsonl.gz'; '' for files of unknown kinds."""
    last = path.suffix.lower()
    if last in PACKERS and path.with_suffix("").suffix.lower() in TEXTUAL:
        return path.with_suffix("").suffix.lower() + last
    return last if last in SUFFIXES else ""


def find_source_files(source: Source, cache: Path) -> list[SourceFile]:
    """The files or the data set behind a source, in a fixed order, with their identities.

    Args:
        source: of the recipe.
        cache: folder of downloaded files.

    Raises:
        UserError: nothing exists at `path`, or nothing that can be read.
    """
    if is_remote(source.path):
        copies = fetch(source.path, cache, readable_files)
        source_files = _files(_readable([copy for _, copy in copies], source), source)
        return [
            replace(source_file, name=url)
            for source_file, (url, _) in zip(source_files, copies, strict=True)
        ]
    path = local_path(source.path)
    if _is_saved_dataset(path):
        return [_saved(path, source)]
    paths = _local_paths(source, say)
    return [_from_hub(source)] if paths is None else _files(paths, source)


def _is_saved_dataset(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in SAVED_DATASET_FILES)


def _local_paths(source: Source, report: Callable[[str], None]) -> list[Path] | None:
    """The file, the files of a folder or those of a glob; None for what may be on the hub.

    Args:
        report: takes a line about files that are left out.

    Raises:
        UserError: there is nothing, or nothing that can be read.
    """
    path = local_path(source.path)
    if path.is_dir():
        paths = _in_folder(path, report)
    elif path.exists():
        paths = [path]
    elif glob.has_magic(str(path)):
        paths = _matches(path)
    elif near := _near_names(path):
        message = "no such file or folder"
        raise UserError(
            message, where=source.path, fix=f"did you mean {' or '.join(near)}?{HUB_HINT}"
        )
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path) and not file_kind(path):
        return None
    else:
        raise UserError("no such file", where=source.path, fix="correct `path`, or create the file")
    return _readable(paths, source)


def _near_names(path: Path) -> list[str]:
    """Similar names in the folder of a missing path: it is a typo, not a data set of the hub."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    close = get_close_matches(path.name, names, n=2, cutoff=0.8)
    return [str(path.parent / name) for name in close]


def _readable(paths: list[Path], source: Source) -> list[Path]:
    """The paths, of which there is at least one, and all are of known types."""
    if not paths:
        raise UserError(
            f"no readable files here ({', '.join(SUFFIXES)})",
            where=source.path,
            fix="correct `path`; ** includes subfolders",
        )
    if pipes := [path for path in paths if not path.is_file()]:
        fix = "write it to a file: data is read more than once"
        raise UserError("is not a file", where=str(pipes[0]), fix=fix)
    if unknown := [path for path in paths if not file_kind(path)]:
        raise _unknown_kind(unknown[0])
    return paths


def files_here(source: Source, report: Callable[[str], None] = say) -> list[SourceFile]:
    """The source's files without identities, which take a pass over them.

    None of URLs, data sets of the `datasets` library, and samples that are not built yet.

    Args:
        report: takes a line about files that are left out.

    Raises:
        UserError: as `find_source_files`.
    """
    sample = sample_name(source.path)
    is_unbuilt = sample is not None and not sample_folder(sample).is_dir()
    if is_remote(source.path) or is_unbuilt or _is_saved_dataset(local_path(source.path)):
        return []
    paths = _local_paths(source, report) or []
    return [SourceFile(str(path), file_kind(path), "", path) for path in paths]


def _matches(path: Path) -> list[Path]:
    """The files that a glob matches."""
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    return [file for file in matches if file.is_file()]


def _in_folder(folder: Path, report: Callable[[str], None]) -> list[Path]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [folder / name for name in readable_files(names, str(folder), report)]
    inside = folder.resolve()
    for path in files:  # write access to the folder must not allow reading other files
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            message = f"a symlink to a file outside of its folder: {path.resolve()}"
            fix = "copy the file, or name the link itself in `path` if this is intended"
            raise UserError(message, where=str(path), fix=fix)
    return files


def readable_files(
    names: Iterable[Path], folder: str, report: Callable[[str], None] = say
) -> list[Path]:
    """The files of known types in a folder, sorted; reports how many others it skips.

    Args:
        names: of all its files, relative to it; hidden ones, and those in hidden folders, are not
            counted.
        report: takes that line.
    """
    visible = sorted(x for x in names if not any(part.startswith(".") for part in x.parts))
    if skipped := [name for name in visible if not file_kind(name)]:
        report(f"{folder}: skips files of types that it cannot read: {count_by_type(skipped)}")
    return [name for name in visible if file_kind(name)]


def count_by_type(paths: Iterable[Path]) -> str:
    """'3 .html, 1 without suffix', the most frequent first."""
    counts = Counter(file_kind(path) or path.suffix.lower() or "without suffix" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _files(paths: list[Path], source: Source) -> list[SourceFile]:
    sizes = [path.stat().st_size for path in paths]
    is_slow = sum(sizes) >= PROGRESS_FROM_BYTES
    source_files = []
    with progress(f"hashing {source.path}", sum(sizes)) if is_slow else nullcontext() as meter:
        for path, size in zip(paths, sizes, strict=True):
            file = FileIdentity.of(path)
            source_files.append(
                SourceFile(str(path), file_kind(path), file.digest, path, files=(file,))
            )
            if meter:
                meter.advance(size)
    return source_files


def _unknown_kind(path: Path) -> UserError:
    if path.name.lower().endswith(ARCHIVES):
        message = "archives are not unpacked: they could write outside of their folder"
        return UserError(message, where=str(path), fix="unpack it and name the folder")
    return UserError(
        f"unknown file type: {path.suffix or 'no suffix'}",
        where=str(path),
        fix=f"use {', '.join(SUFFIXES)}, or .jsonl.gz and similar",
    )


def _saved(folder: Path, source: Source) -> SourceFile:
    try:
        loaded: Any = datasets.load_from_disk(str(folder))
        dataset = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except KeyError as error:
        raise UserError(
            f"the dataset has no split {source.split!r}",
            where=source.path,
            fix=f"set `split` to one of {', '.join(loaded)}",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=source.path) from error
    files = _cache_files(dataset)
    hashes = [file.digest for file in files]
    return SourceFile(source.path, "dataset", fingerprint(hashes), dataset=dataset, files=files)


def _cache_files(dataset: Any) -> tuple[FileIdentity, ...]:
    return tuple(FileIdentity.of(Path(file["filename"])) for file in dataset.cache_files)


def _from_hub(source: Source) -> SourceFile:
    say(f"{source.path}: no such file or folder here, trying the hub")
    try:
        dataset: Any = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the hub's client raises many types of errors
        raise UserError(
            f"no such file or folder, and not on the hub: {first_line(error)}",
            where=source.path,
            fix="correct `path` or `split`, or download the dataset where there is a network",
        ) from error
    files = _cache_files(dataset)
    identity = fingerprint([dataset._fingerprint, *(file.digest for file in files)])
    name = f"{source.path}[{source.split}]"
    return SourceFile(name, "dataset", identity, dataset=dataset, files=files)
