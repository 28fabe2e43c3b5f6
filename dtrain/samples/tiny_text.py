"""Data for the recipe `tiny`: sentences of a toy world, and questions about it.

The sentences share a few dozen words and one grammar, so that even a random model of two layers
learns something in ten steps.
"""

from __future__ import annotations

import json
from pathlib import Path

from dtrain.core.files import write_atomic, write_json
from dtrain.samples.draw import choose

ANIMALS = ["fox", "owl", "cat", "dog", "hen", "cow", "bee", "ant"]
COLOURS = ["red", "blue", "green", "white", "black"]
PLACES = ["in the garden", "by the river", "under the tree", "on the hill"]
VERBS = ["sees", "finds", "follows", "likes"]
SENTENCES_OF_DOCUMENT = (2, 3, 5, 8)
DOCUMENTS, ROWS, HELD_OUT = 240, 240, 24


def make(folder: Path) -> None:
    """Write texts, tasks and questions, each with a held-out part, into `folder`."""
    documents = [{"text": document(i)} for i in range(DOCUMENTS + HELD_OUT)]
    rows = [task(i) for i in range(ROWS + HELD_OUT)]
    questions = [{"question": row["instruction"], "answer": row["output"]} for row in rows[ROWS:]]
    write_lines(folder / "domain.jsonl", documents[:DOCUMENTS])
    write_lines(folder / "domain-heldout.jsonl", documents[DOCUMENTS:])
    write_json(folder / "task.json", rows[:ROWS])
    write_json(folder / "task-heldout.json", rows[ROWS:])
    write_lines(folder / "questions.jsonl", questions)


def document(index: int) -> str:
    """A few sentences of the toy world; lengths differ, so that packing has something to do."""
    sentences = choose(SENTENCES_OF_DOCUMENT, "sentences", index)
    return " ".join(_sentence("domain", index, i) for i in range(sentences))


def task(index: int) -> dict[str, str]:
    """An alpaca row: a sentence, a question about it, and the answer that follows from it."""
    animal = choose(ANIMALS, "task animal", index)
    colour = choose(COLOURS, "task colour", index)
    place = choose(PLACES, "task place", index)
    if index % 2:
        question, answer = f"Where is the {animal}?", f"The {animal} is {place}."
    else:
        question, answer = f"Which colour is the {animal}?", f"The {animal} is {colour}."
    told = f"The {colour} {animal} sleeps {place}."
    return {"instruction": f"{told} {question}", "input": "", "output": answer}


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """Write `rows` as JSON lines."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _sentence(*key: object) -> str:
    who, what = choose(ANIMALS, "who", *key), choose(ANIMALS, "what", *key)
    colour, verb = choose(COLOURS, "colour", *key), choose(VERBS, "verb", *key)
    return f"The {colour} {who} {verb} the {what} {choose(PLACES, 'place', *key)}."
