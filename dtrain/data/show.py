"""Show training sequences, or rows before tokenization, in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dtrain.core.output import visible
from dtrain.data.conversations import Conversation, Preference
from dtrain.data.packed_dataset import PackedDataset, PackedSequence
from dtrain.data.records import BadRecord, Record
from dtrain.data.sources import SourceFile

SHOWN_CHARACTERS = 4000  # of a text: some are whole books
HEAD, TRAINED, NOTE = "bold blue", "green", "dim"


def sequences(
    dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase, seed: int, count: int, color: bool
) -> Iterator[Text]:
    """The first sequences of training, document by document.

    Args:
        dataset: of a stage.
        tokenizer: that made it.
        seed: of the recipe.
        count: sequences to show.
        color: show tokens with loss in green; otherwise between ⟦ and ⟧.
    """
    sequence_ids = dataset.sequence_ids_at(0, count, seed).tolist()
    total = int(dataset.first_sequences[-1])
    for position, number in enumerate(sequence_ids[: dataset.sequences_per_epoch], start=1):
        sequence = dataset.sequence(number)
        head = (
            f"{position}. sequence {number + 1:,} of {total:,}, "
            f"{sequence.input_ids.size:,} of {dataset.sequence_length:,} tokens, "
            f"{int(sequence.is_target.sum()):,} with loss, documents: {sequence.lengths.size}\n"
        )
        yield Text(head, style=HEAD)
        yield from _documents(sequence, tokenizer, color)
    for note in dataset.notes():
        yield Text(f"{note}\n", style=NOTE)


def _documents(
    sequence: PackedSequence, tokenizer: PreTrainedTokenizerBase, color: bool
) -> Iterator[Text]:
    start = 0
    for location, length in zip(sequence.documents, sequence.lengths.tolist(), strict=True):
        ids = sequence.input_ids[start : start + length]
        has_loss = sequence.is_target[start : start + length]
        tokens = f"tokens {start}–{start + length - 1}, {int(has_loss.sum()):,} with loss"
        note = f"── {location}: {tokens}\n"
        yield Text(note, style=NOTE) + _colored(ids, has_loss, tokenizer, color) + Text("\n")
        start += length


def _colored(
    ids: np.ndarray, has_loss: np.ndarray, tokenizer: PreTrainedTokenizerBase, color: bool
) -> Text:
    """The tokens as text; runs of tokens with loss are highlighted."""
    text = Text()
    edges = [0, *(np.flatnonzero(has_loss[1:] != has_loss[:-1]) + 1).tolist(), len(ids)]
    for start, stop in pairwise(edges):
        decoded = tokenizer.decode(ids[start:stop].tolist())
        text_run = visible(str(decoded))
        if not has_loss[start]:
            text.append(text_run)
        elif color:
            text.append(text_run, style=TRAINED)
        else:
            text.append(f"⟦{text_run}⟧")
    return text


def render_records(
    records: Iterator[Record | BadRecord], source_files: list[SourceFile], count: int
) -> Iterator[Text]:
    """The first rows before any template; a bad row is shown as its error."""
    for item in islice(records, count):
        location = source_files[item.file_index].location(item.row_number)
        if isinstance(item, BadRecord):
            yield Text(f"── {item.error}\n", style="red")
            continue
        yield Text(f"── {location}\n", style=HEAD)
        for title, value in _sides(item.value):
            yield (Text(f"{title}\n", style=HEAD) if title else Text()) + _turns(value)


def _sides(value: Any) -> Iterator[tuple[str, str | Conversation]]:
    if not isinstance(value, Preference):
        yield "", value
        return
    if value.chosen:
        yield "chosen", value.chosen
    if value.rejected:
        yield "rejected", value.rejected


def _turns(value: str | Conversation) -> Text:
    if isinstance(value, str):
        return Text(_head(value) + "\n")
    text = Text()
    if value.tools:
        text.append("tools: ", style=NOTE).append(f"{[t['function'] for t in value.tools]}\n")
    for message in value.messages:
        text.append(f"{message['role']}: ", style=NOTE)
        style = TRAINED if message["role"] == "assistant" else ""
        if reasoning := message.get("reasoning_content"):
            text.append(f"(reasoning) {_head(reasoning)}\n", style=style)
        text.append(_head(message["content"]) + "\n", style=style)
        for call in message.get("tool_calls", []):
            text.append(f"  calls {call['function']}\n", style=style)
    return text


def _head(text: str) -> str:
    """The start of a text, and the number of characters left out."""
    more = len(text) - SHOWN_CHARACTERS
    end = f" … and {more:,} more characters" if more > 0 else ""
    return visible(text[:SHOWN_CHARACTERS]) + end
