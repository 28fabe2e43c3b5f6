"""Where rows come from: an address of a recipe into files, or into a data set of `datasets`."""

from __future__ import annotations

import glob
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.config.schema import Source
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.hash_cache import FileIdentity
from dtrain.core.hashes import fingerprint
from dtrain.core.lazy_import import LazyModule
from dtrain.core.log import progress, say
from dtrain.data.remote import fetch, is_remote

datasets: Any = LazyModule("datasets")  # with pandas: a second that most runs need not pay

TEXTUAL = (".txt", ".jsonl", ".json", ".csv")
PACKERS = (".gz", ".zst")
SUFFIXES = (*TEXTUAL, ".parquet", ".arrow")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".tar.gz", ".tar.zst", ".bz2", ".xz")
SAVED_MARKS = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk leaves
SHOWN_FROM_BYTES = 1 << 30  # a second of hashing


@dataclass(frozen=True)
class SourceFile:
    """One file, or one split of a data set.

    Attributes:
        name: as messages show it.
        kind: suffix of the file, or "dataset".
        identity: SHA-256 of the content; of a data set, a hash of its files and its selection.
        path: the file, if it is one.
        rows: the data set, if it is one.
        files: what it is read from, as it was when it was hashed.
    """

    name: str
    kind: str
    identity: str
    path: Path | None = None
    rows: Any = None
    files: tuple[FileIdentity, ...] = ()

    def location(self, number: int) -> str:
        """Name of row `number` (from 1): file:line, file#row, or the file if it is one row."""
        if self.kind.startswith(".txt"):
            return self.name
        return f"{self.name}{':' if self.kind.startswith(('.jsonl', '.csv')) else '#'}{number}"

    def check_unchanged(self, *, again: bool = False) -> None:
        """Check that what was read so far is what was hashed (`FileIdentity.check_unchanged`).

        Raises:
            UserError: a file changed.
        """
        for file in self.files:
            file.check_unchanged(self.name if self.path else str(file.path), again=again)


def file_kind(path: Path) -> str:
    """'a/b.jsonl.gz' → '.jsonl.gz'; '' for files that are not read."""
    last = path.suffix.lower()
    if last in PACKERS and path.with_suffix("").suffix.lower() in TEXTUAL:
        return path.with_suffix("").suffix.lower() + last
    return last if last in SUFFIXES else ""


def find_source_files(source: Source, cache: Path) -> list[SourceFile]:
    """The files or the data set behind a source, in a fixed order, with their identities.

    Args:
        source: of the recipe.
        cache: folder of what is fetched.

    Raises:
        UserError: there is nothing at the address, or nothing that can be read.
    """
    if is_remote(source.path):
        copies = fetch(source.path, cache, file_kind)
        named = zip(_files([copy for _, copy in copies], source), copies, strict=True)
        return [replace(part, name=name) for part, (name, _) in named]
    path = local_path(source.path)
    if path.is_dir() and any((path / mark).exists() for mark in SAVED_MARKS):
        return [_saved(path, source)]
    if path.is_dir():
        return _files(_in_folder(path), source)
    if path.exists():
        return _files([path], source)
    if glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        return _files([file for file in found if file.is_file()], source)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path) and not file_kind(path):
        return [_from_hub(source)]
    raise UserError("no such file", where=source.path, fix="correct `path`, or put the file there")


def _in_folder(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if file_kind(p) and p.is_file())
    found = [path for path in found if not path.name.startswith(".")]
    inside = folder.resolve()
    for path in found:  # whoever can write into the folder must not choose what is read elsewhere
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            what = f"a link that leaves its folder, to {path.resolve()}"
            fix = "copy the file, or name the link itself in `path` if it is meant"
            raise UserError(what, where=str(path), fix=fix)
    return found


def _files(paths: list[Path], source: Source) -> list[SourceFile]:
    if not paths:
        raise UserError(
            f"no file here that can be read ({', '.join(SUFFIXES)})",
            where=source.path,
            fix="correct `path`; ** in it reaches folders below",
        )
    if strange := [path for path in paths if not file_kind(path)]:
        raise _strange(strange[0])
    sizes = [path.stat().st_size for path in paths]
    long = sum(sizes) >= SHOWN_FROM_BYTES
    parts = []
    with progress(f"hashing {source.path}", sum(sizes)) if long else nullcontext() as meter:
        for path, size in zip(paths, sizes, strict=True):
            file = FileIdentity.of(path)
            parts.append(SourceFile(str(path), file_kind(path), file.digest, path, files=(file,)))
            if meter:
                meter.advance(size)
    return parts


def _strange(path: Path) -> UserError:
    if path.name.lower().endswith(ARCHIVES):
        what = "an archive is not read, and not unpacked either: its names may lead anywhere"
        return UserError(what, where=str(path), fix="unpack it yourself and name the folder")
    return UserError(
        f"files that end in {path.suffix or 'nothing'} are not known",
        where=str(path),
        fix=f"name files that end in {', '.join(SUFFIXES)}, or .jsonl.gz and the like",
    )


def _saved(folder: Path, source: Source) -> SourceFile:
    try:
        loaded: Any = datasets.load_from_disk(str(folder))
        rows = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except KeyError as error:
        raise UserError(
            f"there is no split {source.split!r}",
            where=source.path,
            fix=f"`split` is one of {', '.join(loaded)}",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=source.path) from error
    files = _cache_files(rows)
    hashes = [file.digest for file in files]
    return SourceFile(source.path, "dataset", fingerprint(hashes), rows=rows, files=files)


def _cache_files(rows: Any) -> tuple[FileIdentity, ...]:
    return tuple(FileIdentity.of(Path(file["filename"])) for file in rows.cache_files)


def _from_hub(source: Source) -> SourceFile:
    say(f"{source.path}: no such file or folder here, asking the hub")
    try:
        rows: Any = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the hub's client raises anything from KeyError to its own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"no such file or folder, and the hub's data set cannot be had: {reason[0]}",
            where=source.path,
            fix="correct `path` or `split`, or download the data set where there is a network",
        ) from error
    files = _cache_files(rows)
    identity = fingerprint([rows._fingerprint, *(file.digest for file in files)])
    name = f"{source.path}[{source.split}]"
    return SourceFile(name, "dataset", identity, rows=rows, files=files)
