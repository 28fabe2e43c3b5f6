"""Check what the files of a recipe contain, before a run prepares them.

Only rows that decide are read: the first of each source, and rated answers until both labels have
been seen. Folders, files that are elsewhere, and samples that are not made yet are left to the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dtrain.config.objectives import CONTENT, format_mismatch
from dtrain.config.schema import Data, Recipe, Source
from dtrain.core.errors import UserError, UserErrors
from dtrain.data.conversations import Preference
from dtrain.data.records import BadRecord, detect_source_format, iter_records
from dtrain.data.sources import files_here


def check_rows(recipe: Recipe) -> None:
    """Check that every stage and held-out set can use the rows of its sources.

    Raises:
        UserErrors: they are of another format, cannot be read, or are all rated alike.
    """
    errors = list[UserError]()
    for stage in recipe.stages:
        errors += _check_group(f"stages.{stage.name}.data", stage.kind, stage.data)
        labels = Counter[bool]() if errors else _labels(stage.data)
        if len(labels) == 1:
            errors.append(one_label_error(*labels.popitem(), where=f"stages.{stage.name}.data"))
    for name, held_out in recipe.evaluation.sets.items():
        errors += _check_group(f"evaluation.sets.{name}", held_out.kind, held_out)
    if errors:
        raise UserErrors(errors)


def one_label_error(label: bool, answers: int, *, where: str) -> UserError:
    """Rated answers that cannot be compared with each other."""
    return UserError(
        f"all {answers:,} answers are labeled {str(label).lower()}, and kto learns from the "
        "difference",
        where=where,
        fix="add answers with the other label; or train on good answers with kind: sft and "
        "format: messages or prompt_completion",
    )


def _check_group(where: str, kind: str, data: Data) -> Iterator[UserError]:
    for source in data.all_sources:
        try:
            row_format = _row_format(source)
        except UserError as error:
            yield error
            continue
        if row_format is not None and (mismatch := format_mismatch(kind, row_format)):
            message, fix = mismatch
            yield UserError(message, where=f"{where}: {source.path}", fix=fix)


def _row_format(source: Source) -> str | None:
    """The format of a source; None if its files are not here."""
    if source.format != "auto":
        return source.format
    files = files_here(source)
    return detect_source_format(files, source.columns) if files else None


def _labels(data: Data) -> Counter[bool]:
    """The labels of rated answers, counted until both were seen; none if files are elsewhere."""
    labels = Counter[bool]()
    for source in data.all_sources:
        row_format, files = _row_format(source), files_here(source)
        if not files or row_format is None or CONTENT[row_format] != "labeled answer":
            return Counter()
        for record in iter_records(files, row_format, source.columns):
            if isinstance(record, BadRecord):
                return Counter()  # the run and a scan name it
            assert isinstance(record.value, Preference)
            labels[record.value.chosen is not None] += 1
            if len(labels) == 2:
                return labels
    return labels
