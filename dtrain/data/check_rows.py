"""Check the files of a recipe's data before a run prepares them.

Only rows that decide are read: the first of each file, and rated answers until both labels have
been seen. URLs, data sets of the hub and samples that are not built yet are left to the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dtrain.config.data import Data, Source
from dtrain.config.objectives import CONTENT, OBJECTIVES, format_mismatch
from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import SAMPLE_PREFIX, sample_name
from dtrain.core.check_report import CheckReport
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.data.conversations import Preference
from dtrain.data.records import (
    BadRecord,
    detect_source_format,
    files_of_format,
    iter_records,
)
from dtrain.data.remote import is_remote
from dtrain.data.sources import SourceFile, files_here

FIRST_FILES = 32  # of a source, whose first rows are read


def data_groups(recipe: Recipe) -> Iterator[tuple[str, str, Data]]:
    """Key, kind and data of every stage and held-out set."""
    for stage in recipe.stages:
        yield f"stages.{stage.name}.data", stage.kind, stage.data
    for name, held_out in recipe.evaluation.sets.items():
        yield f"evaluation.sets.{name}", held_out.kind, held_out


def check_rows(recipe: Recipe, report: CheckReport) -> None:
    """Check that every stage and held-out set can use the rows of its sources.

    The report gets the errors (no files, rows of another format, answers that are all rated alike),
    and notes of what was left out or not read.
    """
    for key, kind, data in data_groups(recipe):
        formats = [_check_source(key, kind, source, report) for source in data.all_sources]
        rated = [name for name in formats if name and CONTENT[name] == "labeled answer"]
        if key.startswith("stages.") and len(rated) == len(formats):  # a held-out set may be alike
            with report.collect():
                _check_labels(key, data, rated)


def one_label_error(label: bool, answers: int, *, where: str) -> UserError:
    """Rated answers that cannot be compared with each other."""
    return UserError(
        f"all {answers:,} answers are labeled {str(label).lower()}, and kto learns from the "
        "difference",
        where=where,
        fix="add answers with the other label; or train on good answers with kind: sft and "
        "format: messages or prompt_completion",
    )


def reads_template(kind: str, data: Data) -> bool:
    """Whether a stage renders rows with its chat template, as far as their files show."""
    if OBJECTIVES[kind].trains_on_answers:
        return True
    formats = (source.format for source in data.all_sources)
    return any(name != "auto" and CONTENT[name] != "text" for name in formats)


def _check_source(key: str, kind: str, source: Source, report: CheckReport) -> str | None:
    """Report what is wrong with a source; return its format, None if its files are not here."""
    found = len(report.errors)
    row_format: str | None = None
    with report.collect(key):
        files = files_here(source, report.note)
        if not files:
            report.note(unread_note(key, source.path))
            return None if source.format == "auto" else source.format
        row_format = source.format
        if row_format == "auto":
            row_format = detect_source_format(files, source.columns)
        if mismatch := format_mismatch(kind, row_format):
            raise UserError(mismatch[0], where=source.path, fix=mismatch[1])
        _check_first_rows(files_of_format(files, row_format, report.note), row_format, source)
    return row_format if len(report.errors) == found else None


def unread_note(key: str, path: str) -> str:
    """The note of a source that cannot be read here."""
    if sample := sample_name(path):
        return f"{SAMPLE_PREFIX}{sample}: not read here; the run builds this sample"
    if is_remote(path):
        return f"{key}: {path}: not read here; the run downloads it"
    return f"{key}: {path}: not read here; the run takes it for a data set, perhaps of the hub"


def _check_first_rows(files: list[SourceFile], row_format: str, source: Source) -> None:
    """Check the first row of each of the first files.

    Raises:
        UserError: one cannot be used.
        EmptyDataError: the files have no rows.
    """
    has_rows = len(files) > FIRST_FILES
    for file in files[:FIRST_FILES]:
        for record in iter_records([file], row_format, source.columns):
            if isinstance(record, BadRecord):
                raise record.error
            has_rows = True
            break
    if not has_rows:
        raise EmptyDataError("the source has no rows", where=source.path, fix="correct `path`")


def _check_labels(key: str, data: Data, formats: list[str]) -> None:
    """Check that rated answers have both labels, if all files are here.

    Raises:
        UserError: they are all rated alike.
    """
    labels = Counter[bool]()
    for source, row_format in zip(data.all_sources, formats, strict=True):
        files = files_here(source, lambda line: None)
        if not files:
            return
        for record in iter_records(files, row_format, source.columns):
            if isinstance(record, BadRecord):
                return  # the run and a scan name it
            assert isinstance(record.value, Preference)
            labels[record.value.chosen is not None] += 1
            if len(labels) == 2:
                return
    if labels:
        raise one_label_error(*next(iter(labels.items())), where=key)
