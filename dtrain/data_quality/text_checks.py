"""Faults that a row shows by itself: empty, short, garbled, refused, cut off, …"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ftfy.badness import is_bad

from dtrain.data_quality.sample import Sample

EMPTY, SHORT, LONG, SAME = "empty", "short", "long", "same"
GARBLED, REPEATED, SYMBOLS = "garbled", "repeated_lines", "symbols"
REFUSAL, CUT_OFF = "refusal", "cut_off"
KINDS = (EMPTY, SHORT, LONG, SAME, GARBLED, REPEATED, SYMBOLS, REFUSAL, CUT_OFF)

SHORT_CHARACTERS, LONG_CHARACTERS = 10, 4096  # answers outside of these are suspect
# Rae et al., arXiv:2112.11446, table A1, drop a document with such a share of repeated lines.
REPEATED_SHARE = 0.3
# Of all runs of so many words, those that came before; single words come back in any long text.
PHRASE, PHRASES_SHARE = 5, 0.6
WORD_SHARE = 0.5  # of characters that are not blank: letters and digits of any script
LOOKED_AT = 20_000  # characters of a very long text
SYMBOLS_LOOKED_AT = 2_000

_REFUSED = re.compile(
    r"^\W*(?:(?:i'?m|i am) (?:very |truly |really )?sorry[,. ]|i apologi[sz]e|sorry, (?:but )?i|"
    r"(?:unfortunately,? )?i (?:can(?:not|'t|’t)|am (?:not able|unable) to|won'?t be able to) "
    r"(?:help|assist|provide|answer|fulfil|comply|do|complete|generate|create|discuss)|"
    r"es tut mir (?:sehr )?leid, aber .{0,20}kann ich|leider kann ich .{0,30}nicht |"
    r"(?:je suis )?(?:vraiment )?désolée?, (?:mais )?je ne peux pas|"
    r"lo siento(?: mucho)?, (?:pero )?no puedo|"
    r"(?:lamento|sinto muito), (?:mas )?não posso|"
    r"(?:к сожалению|извините|простите), (?:но )?я не могу|"
    r"申し訳(?:ありません|ございません)が、.{0,30}(?:できません|できかねます)|"
    r"as an? (?:ai|artificial|(?:large )?language model)\b[^.!?\n]{0,120}?"
    r"(?:\bnot\b|n['’]t\b|\bcannot\b|\bunable\b|\bno\b|\bunfortunately\b|\black\b)|"
    r"(?:非常|很|真的)?(?:抱歉|对不起|不好意思)[,，。.!！]|"
    r"作为(?:一个|一名|一款)?(?:AI|人工智能|语言模型|大?语言模型)|"
    r"我(?:无法|不能|没有办法)(?:提供|回答|协助|帮助|完成|满足|讨论|生成))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’)\]）】」*_]*(?:\s|$)|[。！？]")
_ENDS_OPEN = re.compile(r"[^\W\d_]$|[,;:，；：、(\[（-]$|[\u2e80-\uffff]\d+$")
_BLANK = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*")  # and signs that show nothing
_NOT_WORDS = re.compile(r"[\W_]+")
# Text decoded with the wrong table has such a pair or letter; a check of the rest is for nothing.
_MAYBE_BAD = re.compile(r"[^\x00-\x7f\u2e80-\uffff]{2}|[ÃÂâ]")

# Kind, what was seen, and how bad it is among its kind.
BadRecord = tuple[str, str, float]


def faults(sample: Sample) -> Iterator[BadRecord]:
    """The faults of a row."""
    answer = sample.answer.strip()
    answered = not _BLANK.fullmatch(answer)
    if not answered or not (sample.is_text or not _BLANK.fullmatch(sample.question)):
        yield EMPTY, "no question" if answered else "no answer", 1
        return
    yield from _length(answer, sample)
    whole = sample.whole[:LOOKED_AT]
    yield from _repeated(sample)
    if garbled := list(_garbled(whole)):  # its signs and its end are not the writer's
        yield from garbled
        return
    yield from _symbols(whole)
    if not sample.is_text:
        yield from _answered(sample.question.strip(), answer)


def _length(answer: str, sample: Sample) -> Iterator[BadRecord]:
    weight = _width(answer[:SHORT_CHARACTERS])
    if len(answer) < SHORT_CHARACTERS and weight < SHORT_CHARACTERS:
        yield SHORT, f"{len(answer)} characters: “{answer}”", -len(answer)
    if len(answer) > LONG_CHARACTERS and not sample.is_text:
        yield LONG, f"{len(answer):,} characters", len(answer)


def _garbled(text: str) -> Iterator[BadRecord]:
    if text.isascii():
        return
    if place := text.find("\ufffd") + 1:
        yield GARBLED, f"a character was lost: {excerpt(text, place - 1)}", 1
    elif _MAYBE_BAD.search(text) and is_bad(text):
        yield GARBLED, "text decoded with the wrong table (mojibake)", 0


def _repeated(sample: Sample) -> Iterator[BadRecord]:
    """Each side by itself: an answer over and over is not hidden by a long question."""
    sides = (_repeated_in(side[:LOOKED_AT]) for side in (sample.answer, sample.question))
    if fault := next((fault for fault in sides if fault), None):
        yield fault


def _repeated_in(text: str) -> BadRecord | None:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    if len(lines) >= 4:
        line, times = Counter(lines).most_common(1)[0]
        again = len(lines) - len(set(lines))
        if times > 2 and again / len(lines) > REPEATED_SHARE:
            return REPEATED, f"{times} times “{line[:60]}”", again / len(lines)
    words = text.split()
    if len(words) < 50:
        return None
    runs = Counter(zip(*(words[start:] for start in range(PHRASE)), strict=False))
    if 1 - len(runs) / runs.total() > PHRASES_SHARE:
        phrase, times = runs.most_common(1)[0]
        return REPEATED, f"{times} times “{' '.join(phrase)[:60]}”", runs.total() - len(runs)
    return None


def _symbols(text: str) -> Iterator[BadRecord]:
    dense = "".join(text[:SYMBOLS_LOOKED_AT].split())
    if len(dense) < 20:
        return
    share = len(_NOT_WORDS.sub("", dense)) / len(dense)
    if share < WORD_SHARE:
        yield SYMBOLS, f"{1 - share:.0%} of it are neither letters nor digits", -share


def _answered(question: str, answer: str) -> Iterator[BadRecord]:
    if abs(len(question) - len(answer)) < 20 and _plain(question) == _plain(answer):
        yield SAME, f"the answer is the question: “{answer[:60]}”", len(answer)
        return
    if match := _REFUSED.match(answer[:200]):
        yield REFUSAL, f"“{answer[: match.end() + 40].strip()}…”", 1
    if is_cut_off(answer):
        open_block = " in a block of code that is not closed" if answer.count("```") % 2 else ""
        yield CUT_OFF, f"ends with “{excerpt(answer, len(answer))}”{open_block}", len(answer)


def is_cut_off(answer: str) -> bool:
    """Whether prose ends inside a sentence, or a code block is never closed.

    Lists, verses and titles end without a full stop too: only a long last line counts, and only
    in an answer that ends its other sentences.
    """
    if answer.count("```") % 2:
        return True
    last = answer.rsplit("\n", 1)[-1]
    if "```" in answer or not _ENDS_OPEN.search(answer):
        return False
    long_enough = _width(answer[-60:]) >= 60 and _width(last[-30:]) >= 30
    return long_enough and bool(_SENTENCE_END.search(answer))


def _width(text: str) -> int:
    """Characters, those of scripts that need half as many for a word counted twice."""
    return sum(2 if char > "\u2e7f" else 1 for char in text)


def _plain(text: str) -> str:
    return _NOT_WORDS.sub("", text.casefold())


def excerpt(text: str, place: int, around: int = 40) -> str:
    """A line of text around a place."""
    start = max(place - around, 0)
    piece = " ".join(text[start : place + around].split())
    return f"{'…' if start else ''}{piece}{'…' if place + around < len(text) else ''}"
