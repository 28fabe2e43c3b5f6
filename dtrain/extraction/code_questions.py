"""Questions about documented Python code; the answers are quoted from the documentation.

Kinds: `does` (the first sentence of a docstring), `call` (the arguments), `raises` (the exceptions
that a docstring names), `base` (the base class), `which` (the only entry of a module with this
summary). Each question has one right answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.extraction.python_code import Entry

QUESTION_KINDS = ("does", "which", "call", "base", "raises")
ANSWER_CHARACTERS = (20, 160)  # of a summary; shorter ones say too little
CALL_CHARACTERS = 120
NOUNS = {"function": "function", "method": "method", "class": "class", "property": "property"}
SENTENCE = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<=[.!?])\s+(?=[A-Z`'\"(])")
EXCEPTION = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Interrupt|Iteration|Exit)\b")


@dataclass(frozen=True)
class Question:
    """A question about one entry, and its answer."""

    kind: str
    entry: Entry
    question: str
    answer: str


def questions(entries: list[Entry]) -> list[Question]:
    """All questions about `entries` that have exactly one right answer."""
    summaries = Counter((entry.module, summary(entry.doc)) for entry in entries)
    by_text: dict[str, Question] = {}
    for entry in entries:
        unique = summaries[entry.module, summary(entry.doc)] == 1
        for question in _about(entry, unique=unique):
            by_text.setdefault(question.question, question)
    return list(by_text.values())


def summary(doc: str) -> str:
    """The first sentence of a docstring, on one line; "" if it does not begin with one."""
    paragraphs = [" ".join(text.split()) for text in doc.split("\n\n")]
    for text in paragraphs[:2]:
        first: str = SENTENCE.split(text)[0]
        shortest, longest = ANSWER_CHARACTERS
        if shortest <= len(first) <= longest and _is_prose(first):
            return first if first.endswith((".", "!", "?")) else f"{first}."
        if "->" not in text and not re.match(r"[\w.]+\(", text):
            break  # only a line with the call may precede the summary
    return ""


def raised(doc: str) -> list[str]:
    """Exceptions named in sentences that contain "raise", in order."""
    names: dict[str, None] = {}
    for paragraph in doc.split("\n\n"):
        for sentence in SENTENCE.split(" ".join(paragraph.split())):
            if re.search(r"\braise[sd]?\b", sentence, re.IGNORECASE):
                names.update(dict.fromkeys(EXCEPTION.findall(sentence)))
    return list(names)


def _is_prose(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    return (
        len(words) >= 4
        and text[0].isupper()
        and "->" not in text
        and "(c)" not in text
        and ">>>" not in text
        and text.count("(") == text.count(")")
    )


def _about(entry: Entry, *, unique: bool) -> Iterator[Question]:
    noun = NOUNS.get(entry.kind)
    if noun is None:
        return
    name, call, text = (
        entry.full_name,
        entry.full_name + (entry.arguments or ""),
        summary(entry.doc),
    )
    knows_call = entry.arguments is not None and len(call) <= CALL_CHARACTERS
    verb = "stand for" if entry.kind == "property" else "do"
    shown = call if knows_call and entry.kind != "class" else name
    if text:
        yield Question("does", entry, f"What does the {noun} `{shown}` {verb}?", text)
    if knows_call and entry.arguments != "()":
        yield Question("call", entry, f"How is the {noun} `{name}` called?", f"`{call}`")
    if names := raised(entry.doc):
        yield Question(
            "raises",
            entry,
            f"Which exceptions can the {noun} `{name}` raise, according to its documentation?",
            _listed(names),
        )
    if entry.bases and entry.kind == "class":
        yield Question(
            "base",
            entry,
            f"Which classes does the class `{name}` inherit from?",
            _listed(list(entry.bases)),
        )
    short_name = re.escape(entry.name.split(".")[-1])
    if text and unique and not re.search(rf"\b{short_name}\b", text, re.IGNORECASE):
        yield Question(
            "which",
            entry,
            f"Which {noun} of the module `{entry.module}` is documented by these words? {text}",
            f"`{entry.name}`",
        )


def _listed(names: list[str]) -> str:
    """['A', 'B', 'C'] → '`A`, `B` and `C`.'"""
    quoted = [f"`{name}`" for name in names]
    return (" and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))) + "."
