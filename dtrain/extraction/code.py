"""Rows from Python sources of any folder: documentation as texts, and questions about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dtrain.core.errors import UserError
from dtrain.core.log import progress
from dtrain.extraction.code_questions import questions
from dtrain.extraction.python_code import Entry, documents, parse
from dtrain.extraction.text_files import (
    DOMAIN,
    TASK,
    ExtractedRow,
    TextFile,
    find_files,
    read_file,
)

SUFFIXES = (".py",)
TEST_FOLDERS = {"test", "tests", "testing"}


def extract_code(root: Path, left_out: Counter[str]) -> Iterator[ExtractedRow]:
    """Rows of all Python files, which are parsed and never run; `left_out` counts the rest.

    Raises:
        UserError: there are no such files.
    """
    files, entries = dict[str, str](), list[Entry]()
    paths = find_files(root, SUFFIXES, left_out)
    with progress(f"reading {root}", len(paths)) as meter:
        for path in paths:
            meter.advance()
            module = module_name(path, root)
            if is_test(path, root):
                left_out["files of tests"] += 1
            elif module in files:
                left_out["files of a module that another file defines too"] += 1
            elif file := read_file(path, root, left_out):
                files[module] = file.name
                entries += _entries(module, file, left_out)
    yield from _rows(files, sorted(entries, key=lambda entry: (entry.module, entry.name)))


def _entries(module: str, file: TextFile, left_out: Counter[str]) -> list[Entry]:
    try:
        parsed = parse(module, file.text)
    except UserError:
        left_out["files that are not Python source of this version"] += 1
        return []
    if not parsed:
        left_out["files without public documented code"] += 1
    return list({entry.name: entry for entry in reversed(parsed)}.values())  # the first of a name


def _rows(files: dict[str, str], entries: list[Entry]) -> Iterator[ExtractedRow]:
    for entry, text in documents(entries):
        file = files[entry.module]
        yield ExtractedRow(file, DOMAIN, {"text": text, "origin": f"{file}:{entry.line}"})
    for question in questions(entries):
        file = files[question.entry.module]
        messages = [
            {"role": "user", "content": question.question},
            {"role": "assistant", "content": question.answer},
        ]
        origin = f"{file}:{question.entry.line}"
        yield ExtractedRow(file, TASK, {"messages": messages, "origin": origin})


def module_name(path: Path, root: Path) -> str:
    """The name under which a file is imported: its packages are the folders with __init__.py.

    Without packages, the folders below `root`.
    """
    names, folder = [path.stem], path.resolve().parent
    while (folder / "__init__.py").is_file() and folder.parent != folder:
        names.insert(0, folder.name)
        folder = folder.parent
    if len(names) == 1 and root.is_dir():
        names = [*path.relative_to(root).parent.parts, path.stem]
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 1 else names)


def is_test(path: Path, root: Path) -> bool:
    """Whether a file tests others, by its name or that of a folder below `root`."""
    folders = path.relative_to(root).parent.parts if root.is_dir() else ()
    return bool(TEST_FOLDERS & {*folders}) or path.name.startswith(("test_", "conftest."))
