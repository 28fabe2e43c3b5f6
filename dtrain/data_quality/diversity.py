"""How varied instructions are: what they ask to do, and how they begin."""

from __future__ import annotations

import re
from collections import Counter

WORDS_OF_START = 3
MOST_KINDS = 50_000  # kept counts; the rare ones go when there are more

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_FILLERS = """
a an the this that these those my your our their its his her some any each every all of to for in
on at with from by about into as and or one two three four five six seven eight nine ten me us you
it how what why when where which who short brief simple new good best given following provided
below list different main possible least at most up out down is are was were be can could do does
did if please
"""
_BETWEEN = frozenset(_FILLERS.split())
_NO_VERBS = _BETWEEN | {"i", "we", "he", "she", "they", "there", "here", "yes", "no", "not", "hi"}


def start(question: str) -> str:
    """How a question begins: its first words, or characters where words are not set apart."""
    head = question.strip()[:80].casefold()
    words = _WORD.findall(head)
    if words and words[0][0] > "\u2e7f":
        return head[: 2 * WORDS_OF_START]
    return " ".join(words[:WORDS_OF_START])


def verb_object(question: str) -> tuple[str, str] | None:
    """What an English order asks for, as (verb, object); None if it is no such order.

    An order begins with its verb, and the first word behind it that is no filler is near its
    object: a guess that needs no grammar, for counting, not for understanding.
    """
    words = _WORD.findall(question[:200].casefold())
    words = words[1:] if words[:1] == ["please"] else words
    if len(words) < 2 or words[0] in _NO_VERBS or not words[0].isascii():
        return None
    found = next((word for word in words[1:8] if word not in _BETWEEN), None)
    return (words[0], found) if found else None


class Counts:
    """Counts of the most frequent things, in bounded memory."""

    def __init__(self) -> None:
        self.counter: Counter[tuple[str, str] | str] = Counter()

    def update(self, other: Counter[tuple[str, str] | str]) -> None:
        """Add counts; beyond MOST_KINDS, what was seen least is forgotten."""
        self.counter.update(other)
        if len(self.counter) > MOST_KINDS:
            self.counter = Counter(dict(self.counter.most_common(MOST_KINDS // 2)))
