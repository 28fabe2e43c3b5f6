"""The sample corpus: the documentation of Python's standard library, and questions about it.

A hash of its name puts a package or a help topic into the training or the held-out split as a
whole. Texts and answers that occur in both splits are removed from the held-out split.

The questions are those of `dtrain/extraction/code_questions.py`.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from dtrain.core.files import write_json
from dtrain.extraction.code_questions import QUESTION_KINDS, Question, questions
from dtrain.extraction.python_code import Entry
from dtrain.extraction.python_code import documents as code_documents
from dtrain.samples.stdlib import entries, help_topics
from dtrain.samples.tiny_text import stable_number, write_lines

SEED = "python-docs 1"
HELD_OUT_PERCENT = 15
GENERAL = Path(__file__).with_name("general.jsonl")
# The small held-out files have 2 to 3k tokens, which a CPU evaluates in a quarter of a minute.
SMALL_CHARACTERS = 10_000
SMALL_DOCUMENT_CHARACTERS = 1_500
SMALL_ROWS = 36
SMALL_PAIRS = 48
FAR_ROWS = 50  # other modules' questions, for one that its module asks alone
MAX_LIKENESS = 0.75  # share of common words of a right and a wrong answer


def make(folder: Path) -> None:
    """Write the corpus, the questions and the counts of both into `folder`."""
    documented = entries()
    texts = documents(documented, help_topics())
    rows = questions(documented)
    counts = {"python": platform.python_version(), "packages": len({*map(package, documented)})}
    counts |= write_domain(folder, texts) | write_task(folder, rows) | write_pairs(folder, rows)
    shutil.copyfile(GENERAL, folder / "general.jsonl")
    counts["general"] = GENERAL.read_bytes().count(b"\n")
    write_json(folder / "counts.json", counts)


def documents(documented: list[Entry], topics: dict[str, str]) -> list[dict[str, str]]:
    """One document for each module docstring, each function, and each class with its methods."""
    result = [{"text": text, "module": first.module} for first, text in code_documents(documented)]
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


def write_pairs(folder: Path, rows: list[Question]) -> dict[str, int]:
    """Write each question with its answer and a wrong one; return the number in each file."""
    train, held = (
        [row for row in _shuffled(rows) if is_held_out(row.entry.module) == side]
        for side in (False, True)
    )
    known = {row.question for row in train} | {row.answer for row in train}
    held = [row for row in held if not {row.question, row.answer} & known]
    files = {"pairs-train": pairs(train), "pairs-heldout": pairs(held)}
    files["pairs-heldout-small"] = files["pairs-heldout"][:SMALL_PAIRS]
    for name, split in files.items():
        write_json(folder / f"{name}.json", split)
    return {name: len(split) for name, split in files.items()}


def pairs(rows: list[Question]) -> list[dict[str, str]]:
    """Preference rows: the rejected answer is one to a similar question, so it is plausible."""
    by_module: dict[tuple[str, str], list[Question]] = {}
    by_kind: dict[str, list[Question]] = {}
    for row in rows:
        by_module.setdefault((row.kind, row.entry.module), []).append(row)
        by_kind.setdefault(row.kind, []).append(row)
    result = []
    for row in rows:
        near = by_module[row.kind, row.entry.module]
        wrong = wrong_answer(row, near) or wrong_answer(row, by_kind[row.kind][:FAR_ROWS])
        if wrong:
            result.append({"prompt": row.question, "chosen": row.answer, "rejected": wrong})
    return result


def wrong_answer(row: Question, others: Iterable[Question]) -> str:
    """The most similar answer that is not right; "" if there is none.

    A call keeps its name and gets other arguments. An answer that is almost the same may be right.
    """
    right, best, likest = _words(row.answer), "", -1.0
    for other in others:
        answer = other.answer
        if row.kind == "call":
            answer = f"`{row.entry.full_name}{other.entry.arguments}`"
        words = _words(answer)
        likeness = len(right & words) / max(1, len(right | words))
        if answer != row.answer and likest < likeness <= MAX_LIKENESS:
            best, likest = answer, likeness
    return best


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


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
