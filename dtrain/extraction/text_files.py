"""Find and read the text files of a folder; what is left out is counted by reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.core.errors import UserError
from dtrain.core.files import decode_text

MAX_BYTES = 4 << 20  # larger files of documentation or code are generated
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
DOMAIN, TASK = "domain", "task"  # texts for continued pretraining; questions and answers


class ExtractedRow(NamedTuple):
    """A row and where it belongs.

    Attributes:
        document: what is in the training or in the held-out split as a whole.
        kind: DOMAIN or TASK.
        row: in a row format of the recipe, with its origin.
    """

    document: str
    kind: str
    row: dict[str, Any]


@dataclass(frozen=True)
class TextFile:
    """A file's path relative to the folder that was searched, and its text."""

    path: Path
    name: str
    text: str


def find_files(root: Path, suffixes: tuple[str, ...], left_out: Counter[str]) -> list[Path]:
    """The files with these suffixes in a folder, or the file itself, sorted.

    Hidden files and folders are not looked at. Links that lead out of the folder are left out:
    anyone who can write into it could name any file of the user's.

    Raises:
        UserError: there is no such file or folder, or none has such a suffix.
    """
    if not root.exists():
        raise UserError("no such file or folder", where=str(root))
    inside, found = root.resolve(), list[Path]()
    for path in sorted(_walk(root)) if root.is_dir() else [root]:
        if path.suffix.lower() not in suffixes:
            left_out[f"files of other types ({path.suffix.lower() or 'no suffix'})"] += 1
        elif root.is_dir() and not path.resolve().is_relative_to(inside):
            left_out["links to files outside of the folder"] += 1
        elif not path.is_file():
            left_out["not regular files"] += 1
        else:
            found.append(path)
    if not found:
        raise UserError(f"no {' or '.join(suffixes)} files here", where=str(root))
    return found


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if not n.startswith(".") and n not in SKIPPED_FOLDERS]
        yield from (Path(folder) / name for name in files if not name.startswith("."))


def read_file(path: Path, root: Path, left_out: Counter[str]) -> TextFile | None:
    """Read a file; None if it is too large, empty, or no text."""
    name = path.relative_to(root).as_posix() if root.is_dir() else path.name
    try:
        if path.stat().st_size > MAX_BYTES:
            left_out[f"files larger than {MAX_BYTES >> 20} MiB"] += 1
            return None
        text = decode_text(path.read_bytes(), name)
    except OSError as error:
        left_out[f"files that cannot be read ({error.strerror})"] += 1
        return None
    except UserError:
        left_out["files that are not UTF-8 text"] += 1
        return None
    name = name.encode("utf-8", "backslashreplace").decode()
    if not text.strip() or "\0" in text:
        left_out["binary files" if "\0" in text else "empty files"] += 1
        return None
    return TextFile(path, name, text.replace("\r\n", "\n").replace("\r", "\n"))
