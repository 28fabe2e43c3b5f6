"""Scan all rows of a stage or of files, and count their tokens.

Memory holds a compact record per row, never the rows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dtrain.core.errors import UserError
from dtrain.core.log import Meter, progress
from dtrain.data.assistant_spans import render_answers
from dtrain.data.chat_templates import ChatTemplate, resolve_template
from dtrain.data.conversations import Conversation, Preference
from dtrain.data.duplicates import (
    NEAR_SIMILARITY,
    conflicting_answers,
    exact_duplicates,
    near_duplicates,
)
from dtrain.data.formats import RowContent
from dtrain.data.records import BadRecord, Record, SourceRows
from dtrain.data.special_tokens import SpecialTokens
from dtrain.data.text_checks import EMPTY, row_text
from dtrain.data.tokenize import MASKED, count_unread_columns
from dtrain.data_quality.decontamination import HeldOutIndex
from dtrain.data_quality.finding_types import (
    EXACT,
    FLAG_BITS,
    INCONSISTENT,
    NEAR,
    OVERLONG,
    SPECIAL,
    TEMPLATE,
)
from dtrain.data_quality.row_checks import check_batch, check_batch_in_worker, init_worker
from dtrain.data_quality.scan_result import MAX_NOTES, CheckedBatch, RowNote, ScanResult

BATCH_ROWS = 1000
BATCH_CHARACTERS = 1 << 22
REJECTED = -1  # token count of a row that the chat template rejects

Batch = list[tuple[int, Record]]  # records with the index of their source


class TokenCounter:
    """Renders, checks and tokenizes rows, and keeps only the number of tokens.

    Attributes:
        reasons: why the template rejects a row of the last batch, by the row's index.
        counts: of all batches, for `tokenize.notes`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        train_on: str = "all",
        split_special_tokens: bool = True,
    ) -> None:
        """Count with the recipe's settings; `train_on` is "" if every token is a target.

        The template is resolved at the first conversation, which may raise a UserError then.
        """
        self.tokenizer, self.setting, self.train_on = tokenizer, template, train_on
        self.template: ChatTemplate | None = None
        self.reasons: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.special_tokens, self.split = SpecialTokens(tokenizer), split_special_tokens

    def __call__(self, values: list[RowContent]) -> NDArray[np.int32]:
        """Return the tokens of all documents of each row, REJECTED if the template rejects it."""
        self.reasons = {}
        documents = [(n, content) for n, value in enumerate(values) for content in _contents(value)]
        texts = [self._text(number, content) for number, content in documents]
        known = [text for text in texts if text is not None]
        special = any(isinstance(value, str) for value in values)
        encoded = self.tokenizer(known, add_special_tokens=special, verbose=False) if known else {}
        lengths = iter([len(ids) for ids in encoded.get("input_ids", [])])
        counts = np.zeros(len(values), np.int32)
        for (number, content), text in zip(documents, texts, strict=True):
            if text is None:
                continue
            length = next(lengths)
            if self.split and self.special_tokens.find(content):
                length = self._split(number, content, text)
            counts[number] += length
        counts[list(self.reasons)] = REJECTED
        return counts

    def _split(self, number: int, content: str | Conversation, text: str) -> int:
        """Tokens of a document whose special tokens are encoded as plain text."""
        hidden = self.special_tokens.hidden(content)
        try:
            if isinstance(hidden, Conversation):
                assert self.template is not None
                hidden = render_answers(self.template, hidden, "", self.train_on, Counter())[0]
            plain = self.special_tokens.template_hidden(text, hidden, "")
            adds = isinstance(content, str)
            return len(self.special_tokens.encode(plain, "", add_special_tokens=adds)[0])
        except UserError as error:
            self.reasons[number] = error.message
            return 0

    def _text(self, number: int, content: str | Conversation) -> str | None:
        if isinstance(content, str):
            return content
        if self.template is None:
            self.template = resolve_template(self.setting, self.tokenizer)
        try:
            text, spans = render_answers(self.template, content, "", self.train_on, self.counts)
        except UserError as error:
            self.reasons[number] = error.message
            return None
        self.counts[MASKED] += bool(self.train_on) and not spans
        return text


def _contents(value: RowContent) -> list[str | Conversation]:
    """What becomes a document: both answers of a pair share a sequence, each with the prompt."""
    if isinstance(value, Preference):
        return [side for side in (value.chosen, value.rejected) if side is not None]
    return [value]


def scan(
    sources: list[SourceRows],
    *,
    held_out: HeldOutIndex | None = None,
    token_counter: TokenCounter | None = None,
    sequence_length: int | None = None,
    processes: int = 1,
) -> ScanResult:
    """Check all rows.

    Args:
        sources: what to read.
        held_out: evaluation data that the rows must not contain.
        token_counter: counts tokens as a stage tokenizes rows.
        sequence_length: tokens in a sequence; longer rows are findings.
        processes: that check rows while this process reads them; with 1 this process does both.

    Raises:
        UserError: a file changed during the scan.
    """
    result = ScanResult(sources, sequence_length, has_tokens=token_counter is not None)
    if token_counter:
        result.note_counts = token_counter.counts
    total = sum(file.path.stat().st_size for s in sources for file in s.files if file.path)
    with progress("scanning", total >> 20) as meter, ExitStack() as stack:
        submit = _batch_checker(processes, held_out, stack)
        batches = _read_batches(sources, result, meter)
        for records, get_checked in _submit_ahead(batches, submit, 2 * processes):
            counts = token_counter([record.value for _, record in records]) if token_counter else 0
            checked = get_checked()
            checked.rows["tokens"] = counts
            if token_counter:
                reasons = token_counter.reasons.items()
                notes = [RowNote(0.0, result.rows + row, reason) for row, reason in reasons]
                result.add_notes(TEMPLATE, notes)
                _flag_special_tokens(checked, records, token_counter.special_tokens)
            count_unread_columns((record for _, record in records), result.note_counts)
            result.add(records, checked)
    for source in sources:
        source.check_unchanged()
    _check_across_rows(result)
    return result


def _flag_special_tokens(
    checked: CheckedBatch, records: Batch, special_tokens: SpecialTokens
) -> None:
    for row, (_, record) in enumerate(records):
        if names := special_tokens.find(record.value):
            checked.rows["flags"][row] |= FLAG_BITS[SPECIAL]
            note = RowNote(float(len(names)), row, " ".join(names))
            checked.notes.setdefault(SPECIAL, []).append(note)


def _batch_checker(
    processes: int, held_out: HeldOutIndex | None, stack: ExitStack
) -> Callable[[Batch], Callable[[], CheckedBatch]]:
    """A function that submits a batch and returns a function that waits for its result."""
    if processes == 1:
        return lambda records: lambda: check_batch([r.value for _, r in records], held_out)
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=init_worker, initargs=(held_out,)
    )
    stack.enter_context(pool)

    def submit(records: Batch) -> Callable[[], CheckedBatch]:
        values = [record.value for _, record in records]
        future: Future[CheckedBatch] = pool.submit(check_batch_in_worker, values)
        return future.result

    return submit


def _submit_ahead(
    batches: Iterator[Batch],
    submit: Callable[[Batch], Callable[[], CheckedBatch]],
    max_pending: int,
) -> Iterator[tuple[Batch, Callable[[], CheckedBatch]]]:
    """Yield batches in order with their pending results, `max_pending` of them submitted ahead."""
    pending: deque[tuple[Batch, Callable[[], CheckedBatch]]] = deque()
    for records in batches:
        pending.append((records, submit(records)))
        if len(pending) >= max_pending:
            yield pending.popleft()
    yield from pending


def _read_batches(sources: list[SourceRows], result: ScanResult, meter: Meter) -> Iterator[Batch]:
    batch: Batch = []
    batch_characters = characters = 0
    for index, source in enumerate(sources):
        for item in source.rows():
            if isinstance(item, BadRecord):
                result.unreadable += 1
                if len(result.unreadable_notes) < MAX_NOTES:
                    result.unreadable_notes.append(f"{item.error.where}: {item.error.message}")
                continue
            batch.append((index, item))
            text = row_text(item.value)
            size = len(text.question) + len(text.answer)
            batch_characters, characters = batch_characters + size, characters + size
            if len(batch) >= BATCH_ROWS or batch_characters >= BATCH_CHARACTERS:
                meter.advance((characters >> 20) - meter.done, f"{result.rows:,} rows")
                yield batch
                batch, batch_characters = [], 0
    if batch:
        yield batch


def _check_across_rows(result: ScanResult) -> None:
    """Find what only all rows together show: duplicates, conflicting answers, overlong rows."""
    column = result.column
    empty = result.has_finding(EMPTY)
    for later, first in exact_duplicates(column("text")):
        nonempty = ~empty[later]
        _flag_repeats(result, EXACT, later[nonempty], first[nonempty])
    skipped = result.has_finding(EMPTY, EXACT)
    for same in _same_content(result):
        blocks = near_duplicates(column("sketch"), NEAR_SIMILARITY, skipped, same)
        for later, earlier, similarity in blocks:
            _flag_repeats(result, NEAR, later, earlier, similarity)
    asked = column("asked") & ~result.has_finding(EMPTY, EXACT, NEAR)
    for later, first in conflicting_answers(column("question"), column("answer"), asked):
        _flag_repeats(result, INCONSISTENT, later, first)
    if result.has_tokens:
        _check_token_counts(result)


def _same_content(result: ScanResult) -> Iterator[NDArray[np.uint64]]:
    """Groups of rows that can be near duplicates: they ask the same, or the answer is the same.

    Other questions from one template differ in both, whatever their similarity.
    """
    column = result.column
    yield column("question_words").astype(np.uint64)
    if column("asked").any():
        numbers = column("question_numbers").astype(np.uint64) << np.uint64(16)
        yield numbers | column("answer_words")


def _flag_repeats(
    result: ScanResult,
    kind: str,
    rows: NDArray[np.int64],
    earlier: NDArray[np.int64],
    similarity: NDArray[np.float32] | None = None,
) -> None:
    """Flag rows that repeat earlier rows, and note the most similar ones."""
    result.flags[rows] |= np.uint32(FLAG_BITS[kind])
    severity = np.zeros(len(rows), np.float32) if similarity is None else similarity
    for index in np.lexsort((rows, -severity))[:MAX_NOTES].tolist():
        location = result.location(int(earlier[index]))
        if similarity is not None:
            note = f"about {min(similarity[index], 0.99):.0%} similar to {location}"
        else:
            note = f"same as {location}" if kind == EXACT else f"also asked in {location}"
        result.add_notes(kind, [RowNote(float(severity[index]), int(rows[index]), note)])


def _check_token_counts(result: ScanResult) -> None:
    tokens = result.column("tokens")
    result.flags[tokens == REJECTED] |= np.uint32(FLAG_BITS[TEMPLATE])
    if result.sequence_length:
        overlong = np.flatnonzero(tokens > result.sequence_length)
        result.flags[overlong] |= np.uint32(FLAG_BITS[OVERLONG])
        longest = overlong[np.argsort(-tokens[overlong], kind="stable")][:MAX_NOTES].tolist()
        notes = [RowNote(float(tokens[row]), row, f"{tokens[row]:,} tokens") for row in longest]
        result.add_notes(OVERLONG, notes)
