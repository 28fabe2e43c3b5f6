"""What the files at a path contain, for a first recipe: kinds of rows, and about how many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dtrain.config.data import Source
from dtrain.config.objectives import CONTENT, ContentKind
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.data.readers import iter_rows
from dtrain.data.records import detect_source_format
from dtrain.data.sources import SourceFile, files_here

BYTES_PER_TOKEN = 4  # of English text; about right within a factor of two
UNPACKED = {".gz": 4.0, ".zst": 4.0, ".parquet": 3.0}  # bytes of text for each byte of the file
COUNTED_ROWS = 20_000  # of a file; more are estimated from its size


@dataclass(frozen=True)
class DataSurvey:
    """Files of a path that hold the same kind of content.

    Attributes:
        paths: of sources that read them.
        row_format: `format` of the sources.
        rows: about so many; documents, if the files are plain text.
        tokens: about so many, by the files' sizes.
    """

    paths: tuple[str, ...]
    row_format: str
    rows: int
    tokens: int

    @property
    def content(self) -> ContentKind:
        """What a row holds."""
        return CONTENT[self.row_format]


def survey_data(path: str) -> list[DataSurvey]:
    """The kinds of content at a path, one entry for each format.

    Args:
        path: file, glob or folder.

    Raises:
        UserError: there are no files here, or the rows of one have no known format.
    """
    files = files_here(Source(path=path), lambda line: None)
    if not files:
        fix = "name files on this machine; other sources can be written into the recipe later"
        raise UserError("no such file or folder here", where=path, fix=fix)
    by_format: dict[str, list[SourceFile]] = {}
    for file in files:
        try:
            by_format.setdefault(detect_source_format([file], {}), []).append(file)
        except EmptyDataError:
            continue
    if not by_format:
        raise EmptyDataError("the files have no rows", where=path)
    is_single = len(by_format) == 1
    return [
        DataSurvey(
            (path,) if is_single else tuple(_patterns(path, members, files)),
            row_format,
            sum(map(_rows, members)),
            round(sum(map(_text_bytes, members)) / BYTES_PER_TOKEN),
        )
        for row_format, members in by_format.items()
    ]


def _patterns(path: str, members: list[SourceFile], files: list[SourceFile]) -> Iterable[str]:
    """Sources for some of the files at a path: a glob for each type of file, where it can be."""
    shared = {file.kind for file in files if file not in members}
    for kind in sorted({file.kind for file in members}):
        if kind not in shared and local_path(path).is_dir():
            yield f"{path.rstrip('/')}/**/*{kind}"
        else:
            yield from (file.name for file in members if file.kind == kind)


def _rows(file: SourceFile) -> int:
    """About how many rows a file has."""
    if file.is_prose:
        return 1
    rows = sum(1 for _ in islice(iter_rows(file), COUNTED_ROWS))
    if rows < COUNTED_ROWS:
        return rows
    read = sum(len(str(parse())) for _, parse in islice(iter_rows(file), 1000)) / 1000
    return max(rows, round(_text_bytes(file) / read))


def _text_bytes(file: SourceFile) -> float:
    assert file.path is not None
    factor = next((UNPACKED[end] for end in UNPACKED if file.kind.endswith(end)), 1.0)
    return factor * Path(file.path).stat().st_size
