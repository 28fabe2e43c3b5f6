"""A source opened for reading: its files, its row format, and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dtrain.config.schema import Source
from dtrain.core.cache_paths import cache_folder
from dtrain.core.errors import EmptyDataError
from dtrain.data.records import BadRecord, Record, detect_source_format, iter_records
from dtrain.data.sources import SourceFile, find_source_files


@dataclass(frozen=True)
class SourceRows:
    """The files of a source, and how to read them.

    Attributes:
        name: the path that the recipe names.
        files: the source's files, in order.
        row_format: a row format of the recipe, or "auto".
        columns: names of the format's columns in the files, where they differ.
    """

    name: str
    files: list[SourceFile]
    row_format: str
    columns: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[Record | BadRecord]:
        """All rows; unusable ones are faults."""
        return iter_records(self.files, self.row_format, self.columns)

    def location(self, item: Record | BadRecord) -> str:
        """The file and line of a row."""
        return self.files[item.file_index].location(item.row_number)

    def check_unchanged(self) -> None:
        """Check that the files still have the content that they had when they were found.

        Raises:
            UserError: a file changed.
        """
        for file in self.files:
            file.check_unchanged(again=True)


def open_source(source: Source) -> SourceRows:
    """Find the files of a source, and detect its format if it is "auto".

    Raises:
        UserError: there is nothing to read.
    """
    files = find_source_files(source, cache_folder() / "stores")
    columns: dict[Any, str] = dict(source.columns)
    try:
        row_format = (
            detect_source_format(files, columns) if source.format == "auto" else source.format
        )
    except EmptyDataError:
        row_format = "text"  # an empty source gets a report too
    return SourceRows(source.path, files, row_format, columns)
