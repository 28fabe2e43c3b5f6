"""The sample corpus: the documentation of Python's standard library, split by package.

A hash of its name puts a package or a help topic into the training or the held-out split as a
whole. Texts and answers that occur in both splits are removed from the held-out split.
"""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import groupby, zip_longest
from pathlib import Path

from dtrain.core.files import write_json
from dtrain.samples.questions import Question, questions
from dtrain.samples.stdlib import Entry, entries, help_topics
from dtrain.samples.tiny_text import stable_number, write_lines

SEED = "python-docs 1"
HELD_OUT_PERCENT = 15
GENERAL = Path(__file__).with_name("general.jsonl")
# The small held-out files have 2 to 3k tokens, which a CPU evaluates in a quarter of a minute.
SMALL_CHARACTERS = 10_000
SMALL_DOCUMENT_CHARACTERS = 1_500
SMALL_ROWS = 36
QUESTION_KINDS = ("does", "which", "call", "base", "raises")


def make(folder: Path) -> None:
    """Write the corpus, the questions and the counts of both into `folder`."""
    documented = entries()
    texts = documents(documented, help_topics())
    rows = questions(documented)
    counts = {"python": platform.python_version(), "packages": len({*map(package, documented)})}
    counts |= write_domain(folder, texts) | write_task(folder, rows)
    shutil.copyfile(GENERAL, folder / "general.jsonl")
    counts["general"] = len(GENERAL.read_text(encoding="utf-8").splitlines())
    write_json(folder / "counts.json", counts)


def documents(documented: list[Entry], topics: dict[str, str]) -> list[dict[str, str]]:
    """One document for each module docstring, each function, and each class with its methods."""
    result = []
    for (module, _), group in groupby(documented, key=lambda e: (e.module, e.name.split(".")[0])):
        text = "\n\n".join(f"{entry.heading}\n\n{entry.doc}" for entry in group)
        result.append({"text": text, "module": module})
    for name, text in sorted(topics.items()):
        result.append({"text": text.strip(), "module": f"help {name}"})
    return result


def package(entry: Entry) -> str:
    """The outermost package of an entry's module."""
    return entry.module.split(".")[0]


def is_held_out(module: str) -> bool:
    """Whether a module's package belongs to the held-out split."""
    return stable_number(SEED, "split", module.split(".")[0]) % 100 < HELD_OUT_PERCENT


def write_domain(folder: Path, texts: list[dict[str, str]]) -> dict[str, int]:
    """Write the texts; return the number of texts in each file."""
    train = shuffled_rows(row for row in texts if not is_held_out(row["module"]))
    known = {row["text"] for row in train}
    held = shuffled_rows(
        row for row in texts if is_held_out(row["module"]) and row["text"] not in known
    )
    files = {"domain-train": train, "domain-heldout": held, "domain-heldout-small": _small(held)}
    for name, split in files.items():
        write_lines(folder / f"{name}.jsonl", split)
    return {name: len(split) for name, split in files.items()}


def write_task(folder: Path, rows: list[Question]) -> dict[str, object]:
    """Write the questions; return their number in each file, and of each kind."""
    train = _shuffled(row for row in rows if not is_held_out(row.entry.module))
    known = {row.answer for row in train if row.kind == "does"}
    held = _shuffled(
        row for row in rows if is_held_out(row.entry.module) and row.answer not in known
    )
    files = {"task-train": train, "task-heldout": held, "task-heldout-small": held[:SMALL_ROWS]}
    for name, split in files.items():
        write_json(folder / f"{name}.json", [_alpaca(row) for row in split])
    asked = [{"question": row.question, "answer": row.answer} for row in _by_turns(held)]
    write_lines(folder / "questions.jsonl", asked)
    kinds = {
        name: dict(sorted(Counter(row.kind for row in split).items()))
        for name, split in files.items()
    }
    return {name: len(split) for name, split in files.items()} | {"kinds": kinds}


def shuffled_rows(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows in a random order that is the same each time."""
    return sorted(rows, key=lambda row: stable_number(SEED, "order", row["module"], row["text"]))


def _shuffled(rows: Iterable[Question]) -> list[Question]:
    return sorted(rows, key=lambda row: stable_number(SEED, "order", row.question))


def _by_turns(rows: list[Question]) -> list[Question]:
    """The rows in turns of one per kind, so that any prefix contains all kinds."""
    kinds = [[row for row in rows if row.kind == kind] for kind in QUESTION_KINDS]
    return [row for turn in zip_longest(*kinds) for row in turn if row is not None]


def _alpaca(row: Question) -> dict[str, str]:
    return {"instruction": row.question, "input": "", "output": row.answer}


def _small(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first short rows, up to a fixed total number of characters."""
    result: list[dict[str, str]] = []
    for row in (row for row in rows if len(row["text"]) <= SMALL_DOCUMENT_CHARACTERS):
        if sum(len(kept["text"]) for kept in result) + len(row["text"]) <= SMALL_CHARACTERS:
            result.append(row)
    return result
