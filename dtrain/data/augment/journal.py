"""The model's replies, a line each, as they come: what was paid for is not asked again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError

Id = tuple[int, int]  # number of the row, number of the reply to it


class Journal:
    """A file that only grows; a process that is killed loses at most the line it was writing."""

    def __init__(self, path: Path) -> None:
        """Open or make it; a torn last line is dropped.

        Raises:
            UserError: a line before the last cannot be read.
        """
        self.path = path
        path.touch()
        with open(path, "rb+") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
        self.done: set[Id] = {(line["row"], line["copy"]) for line in self.replies()}
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines, of replies and of failures that were paid for, in the order they came."""
        with open(self.path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                    yield {**line, "row": int(line["row"]), "copy": int(line["copy"])}
                except (ValueError, KeyError, TypeError) as error:
                    what = "not a line that dtrain wrote"
                    fix = "remove the line: what it held is asked again"
                    raise UserError(what, where=f"{self.path}:{number}", fix=fix) from error

    def replies(self) -> Iterator[dict[str, Any]]:
        """The lines of replies; what failed is neither done nor of use."""
        return (line for line in self.lines() if "failed" not in line)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, on the disk when this returns."""
        os.write(self._file, json.dumps(line, ensure_ascii=False).encode() + b"\n")
        os.fsync(self._file)
        if "failed" not in line:
            self.done.add((line["row"], line["copy"]))

    def close(self) -> None:
        """Nothing is written any more."""
        os.close(self._file)
