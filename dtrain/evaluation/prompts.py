"""Sets of prompts: the rows of a file, as the recipe's chat template renders them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from dtrain.config.data import Source
from dtrain.config.generation import METRICS, GenerationSet
from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import store_folder
from dtrain.core.check_report import CheckReport
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.core.hashes import fingerprint
from dtrain.data.chat_templates import ChatTemplate, answering_template, render_prompt
from dtrain.data.check_rows import unread_note
from dtrain.data.conversations import Conversation, Preference
from dtrain.data.formats import convert_row, detect_format
from dtrain.data.readers import iter_rows
from dtrain.data.sources import SourceFile, files_here, find_source_files
from dtrain.evaluation.metric import Metric, PromptRow, build_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings that do not change what a model answers and how answers are scored; the rows count.
NEUTRAL_KEYS: dict[str, Any] = dict.fromkeys(
    ("path", "format", "columns", "limit", "batch_size"), True
) | {"judge": {"max_requests"}}


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts, ready to be answered.

    Attributes:
        texts: what a model continues, by row.
        longest_prompt: tokens.
        fingerprint: of all that decides the scores of a model.
    """

    settings: GenerationSet
    rows: list[PromptRow]
    texts: list[str]
    longest_prompt: int
    metrics: dict[str, Metric]
    fingerprint: str


def prepare_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, PromptSet]:
    """Read and render the sets of `evaluation.generation`, by name.

    Args:
        tokenizer: of the base.

    Raises:
        UserError: a file, a row, the template or a metric cannot be used.
    """
    if not recipe.evaluation.generation:
        return {}
    template = answering_template(recipe.chat_template, tokenizer)
    return {
        name: _prepare(name, settings, template, tokenizer)
        for name, settings in recipe.evaluation.generation.items()
    }


def _prepare(
    name: str, settings: GenerationSet, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> PromptSet:
    metrics = build_metrics(settings, name)
    rows, texts = [], []
    for row in read_prompts(settings, f"evaluation.generation.{name}"):
        try:
            texts.append(render_prompt(template, row.prompt))
        except UserError as error:
            raise UserError(error.message, where=row.location, fix=error.fix) from error
        _check_row(row, metrics, template)
        rows.append(row)
    counts = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    decisive = settings.model_dump(mode="json", exclude=NEUTRAL_KEYS)
    references = [row.reference for row in rows]
    inputs = [metric.inputs() for metric in metrics.values()]
    identity = fingerprint([decisive, texts, references, inputs])
    return PromptSet(settings, rows, texts, max(counts), metrics, identity)


def _check_row(row: PromptRow, metrics: dict[str, Metric], template: ChatTemplate) -> None:
    _check_reference(row, metrics)
    rendered = ""
    if row.reference is not None:
        rendered = template.render(row.conversation)
    for metric in metrics.values():
        metric.check_row(row, rendered)


def _check_reference(row: PromptRow, metrics: Iterable[str]) -> None:
    for kind in metrics:
        if row.reference is None and METRICS[kind].needs_reference:
            message = f"the row has no reference answer, which {kind} compares with"
            raise UserError(message, where=row.location, fix=f"add one, or remove {kind}")


def check_prompts(recipe: Recipe, report: CheckReport) -> None:
    """Check the rows of every set of prompts whose file is here, without the chat template."""
    for name, settings in recipe.evaluation.generation.items():
        where = f"evaluation.generation.{name}"
        with report.collect():
            with _named(f"{where}.path"):
                files = files_here(_source(settings), report.note)
            if not files:
                report.note(unread_note(where, settings.path))
                continue
            for row in _rows(files, settings, where):
                _check_reference(row, settings.metrics)


def read_prompts(settings: GenerationSet, where: str) -> Iterator[PromptRow]:
    """The rows of a set.

    Args:
        where: key of the set, for messages.

    Raises:
        UserError: the file cannot be read, has no rows, or a row is no conversation.
    """
    with _named(f"{where}.path"):
        files = find_source_files(_source(settings), store_folder())
    yield from _rows(files, settings, where)


def _source(settings: GenerationSet) -> Source:
    return Source(path=settings.path, columns=settings.columns)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Add the key of the recipe to an error."""
    try:
        yield
    except UserError as error:
        raise UserError(error.message, where=f"{key}: {error.where}", fix=error.fix) from error


def _rows(files: list[SourceFile], settings: GenerationSet, where: str) -> Iterator[PromptRow]:
    rows = (
        (parse(), file.location(number))
        for file in files
        for number, parse in iter_rows(file, renamed=settings.columns.values())
    )
    row_format, count = settings.format, 0
    for raw, location in islice(rows, settings.limit):
        location = f"{where}: {location}"
        if isinstance(raw, UserError):
            raise UserError(raw.message, where=location, fix=raw.fix)
        raw, columns = _with_reference(raw, dict(settings.columns))
        if row_format == "auto":
            row_format = detect_format(raw, columns, location)  # type: ignore[assignment]
        yield _prompt_row(raw, row_format, columns, location)
        count += 1
    if not count:
        raise EmptyDataError("the file has no rows", where=f"{where}.path: {settings.path}")


def _with_reference(raw: Any, columns: dict[Any, str]) -> tuple[Any, dict[Any, str]]:
    """The row with the columns of prompt_completion, if it has a prompt and perhaps a reference."""
    completion = columns.setdefault("completion", "completion")
    if isinstance(raw, dict) and columns.get("prompt", "prompt") in raw and completion not in raw:
        raw = raw | {completion: raw.get("reference") or ""}
    return raw, columns


def _prompt_row(raw: Any, row_format: str, columns: dict[Any, str], location: str) -> PromptRow:
    content = convert_row(raw, row_format, columns, location)
    if isinstance(content, Preference):
        content = content.chosen or ""
    if not isinstance(content, Conversation):
        message = f"a row of {row_format} has no prompt with a reference answer"
        fix = "use rows with `prompt` and `reference`, or conversations"
        raise UserError(message, where=location, fix=fix)
    messages, reference = content.messages, None
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        reference = last if last["content"] or last.get("tool_calls") else None
    if not messages:
        raise UserError("the row has no turn before the answer", where=location)
    return PromptRow(replace(content, messages=messages), reference, raw, location)
