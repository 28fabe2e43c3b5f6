"""Data for the recipe `tiny`: sentences about a toy world, and questions about them.

The sentences share a few dozen words and one grammar, so that even a random model of two layers
learns something in ten steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from dtrain.core.files import json_line, write_atomic, write_json

T = TypeVar("T")

ANIMALS = ["fox", "owl", "cat", "dog", "hen", "cow", "bee", "ant"]
COLORS = ["red", "blue", "green", "white", "black"]
PLACES = ["in the garden", "by the river", "under the tree", "on the hill"]
VERBS = ["sees", "finds", "follows", "likes"]
SENTENCES_OF_DOCUMENT = (2, 3, 5, 8)
DOCUMENTS, ROWS, HELD_OUT = 240, 240, 24


def stable_number(*key: object) -> int:
    """A number in 0 … 2**64 - 1 that depends only on `key`, on any machine and Python version.

    Changing a key changes the generated data, and with them the golden losses.
    """
    text = "\0".join(map(str, key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def stable_choice(options: Sequence[T], *key: object) -> T:
    """The option that `key` selects."""
    return options[stable_number(*key) % len(options)]


def make(folder: Path) -> None:
    """Write texts, tasks and questions, with held-out rows of each, into `folder`."""
    documents = [{"text": document(i)} for i in range(DOCUMENTS + HELD_OUT)]
    rows = [task(i) for i in range(ROWS + HELD_OUT)]
    questions = [{"question": row["instruction"], "answer": row["output"]} for row in rows[ROWS:]]
    write_lines(folder / "domain.jsonl", documents[:DOCUMENTS])
    write_lines(folder / "domain-heldout.jsonl", documents[DOCUMENTS:])
    write_json(folder / "task.json", rows[:ROWS])
    write_json(folder / "task-heldout.json", rows[ROWS:])
    write_lines(folder / "questions.jsonl", questions)


def document(index: int) -> str:
    """A few sentences about the toy world; lengths differ, so that packing matters."""
    sentences = stable_choice(SENTENCES_OF_DOCUMENT, "sentences", index)
    return " ".join(_sentence("domain", index, i) for i in range(sentences))


def task(index: int) -> dict[str, str]:
    """An alpaca row: a sentence, a question about it, and its answer."""
    animal = stable_choice(ANIMALS, "task animal", index)
    color = stable_choice(COLORS, "task colour", index)
    location = stable_choice(PLACES, "task place", index)
    if index % 2:
        question, answer = f"Where is the {animal}?", f"The {animal} is {location}."
    else:
        question, answer = f"Which colour is the {animal}?", f"The {animal} is {color}."
    sentence = f"The {color} {animal} sleeps {location}."
    return {"instruction": f"{sentence} {question}", "input": "", "output": answer}


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """Write `rows` as JSON lines."""
    write_atomic(path, "".join(map(json_line, rows)))


def _sentence(*key: object) -> str:
    subject, target = stable_choice(ANIMALS, "who", *key), stable_choice(ANIMALS, "what", *key)
    color, verb = stable_choice(COLORS, "colour", *key), stable_choice(VERBS, "verb", *key)
    return f"The {color} {subject} {verb} the {target} {stable_choice(PLACES, 'place', *key)}."
