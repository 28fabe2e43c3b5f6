"""Rows for a person to look at: as the model will see them, or as they were brought."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dtrain.data.conversations import Conversation, Preference
from dtrain.data.packed_dataset import PackedDataset, PackedSequence
from dtrain.data.records import BadRecord, Record
from dtrain.data.sources import SourceFile

SHOWN_CHARACTERS = 4000  # of a text as it was brought: some are whole books
HEAD, LEARNT, NOTE = "bold blue", "green", "dim"
# Data may hold what a terminal obeys; its pictures are printed instead.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text with pictures of control characters instead of these."""
    return text.translate(CONTROLS)


def sequences(
    dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase, seed: int, count: int, colour: bool
) -> Iterator[Text]:
    """The first sequences of training, document by document.

    Args:
        mixture: of a stage.
        tokenizer: that made it.
        seed: of the recipe.
        count: sequences to show.
        colour: learnt tokens in green; else between ⟦ and ⟧.
    """
    numbers = dataset.sequence_ids_at(0, count, seed).tolist()
    total = int(dataset.first_sequences[-1])
    for place, number in enumerate(numbers[: dataset.sequences_per_epoch], start=1):
        row = dataset.row(number)
        head = (
            f"sequence {place}: row {number + 1:,} of {total:,}, "
            f"{row.input_ids.size:,} of {dataset.sequence_length:,} tokens, "
            f"{int(row.supervised.sum()):,} learnt, documents: {row.lengths.size}\n"
        )
        yield Text(head, style=HEAD)
        yield from _documents(row, tokenizer, colour)
    for note in dataset.notes():
        yield Text(f"{note}\n", style=NOTE)


def _documents(
    row: PackedSequence, tokenizer: PreTrainedTokenizerBase, colour: bool
) -> Iterator[Text]:
    start = 0
    for place, length in zip(row.documents, row.lengths.tolist(), strict=True):
        ids = row.input_ids[start : start + length]
        learnt = row.supervised[start : start + length]
        note = f"── {place}: tokens {start}–{start + length - 1}, {int(learnt.sum()):,} learnt\n"
        yield Text(note, style=NOTE) + _coloured(ids, learnt, tokenizer, colour) + Text("\n")
        start += length


def _coloured(
    ids: np.ndarray, learnt: np.ndarray, tokenizer: PreTrainedTokenizerBase, colour: bool
) -> Text:
    """The tokens as text, run by run of what is learnt and what is not."""
    text = Text()
    edges = [0, *(np.flatnonzero(learnt[1:] != learnt[:-1]) + 1).tolist(), len(ids)]
    for start, stop in pairwise(edges):
        decoded = tokenizer.decode(ids[start:stop].tolist())
        piece = printable(str(decoded))
        if not learnt[start]:
            text.append(piece)
        elif colour:
            text.append(piece, style=LEARNT)
        else:
            text.append(f"⟦{piece}⟧")
    return text


def render_records(
    records: Iterator[Record | BadRecord], parts: list[SourceFile], count: int
) -> Iterator[Text]:
    """The first rows as conversations, before any template; a row at fault as its message."""
    for item in islice(records, count):
        place = parts[item.file_index].location(item.row_number)
        if isinstance(item, BadRecord):
            yield Text(f"── {item.error}\n", style="red")
            continue
        yield Text(f"── {place}\n", style=HEAD)
        for title, value in _sides(item.value):
            yield (Text(f"{title}\n", style=HEAD) if title else Text()) + _turns(value)


def _sides(value: Any) -> Iterator[tuple[str, str | Conversation]]:
    if not isinstance(value, Preference):
        yield "", value
        return
    if value.chosen:
        yield "wanted", value.chosen
    if value.rejected:
        yield "not wanted", value.rejected


def _turns(value: str | Conversation) -> Text:
    if isinstance(value, str):
        return Text(_head(value) + "\n")
    text = Text()
    if value.tools:
        text.append("tools: ", style=NOTE).append(f"{[t['function'] for t in value.tools]}\n")
    for message in value.messages:
        text.append(f"{message['role']}: ", style=NOTE)
        style = LEARNT if message["role"] == "assistant" else ""
        if reasoning := message.get("reasoning_content"):
            text.append(f"(reasoning) {_head(reasoning)}\n", style=style)
        text.append(_head(message["content"]) + "\n", style=style)
        for call in message.get("tool_calls", []):
            text.append(f"  calls {call['function']}\n", style=style)
    return text


def _head(text: str) -> str:
    """The head of a text, and how much follows."""
    more = len(text) - SHOWN_CHARACTERS
    end = f" … and {more:,} more characters" if more > 0 else ""
    return printable(text[:SHOWN_CHARACTERS]) + end
