"""The text of a row, and quality problems that it shows on its own: empty, garbled, cut off, …"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ftfy.badness import is_bad

from dtrain.data.conversations import Conversation, Preference
from dtrain.data.duplicates import letters_and_digits
from dtrain.data.formats import RowContent

EMPTY, SHORT, LONG, SAME = "empty", "short", "long", "same"
GARBLED, REPEATED, SYMBOLS = "garbled", "repeated_lines", "symbols"
REFUSAL, CUT_OFF = "refusal", "cut_off"
TEXT_KINDS = (EMPTY, SHORT, LONG, SAME, GARBLED, REPEATED, SYMBOLS, REFUSAL, CUT_OFF)

SHORT_CHARACTERS, LONG_CHARACTERS = 10, 4096  # lengths of a usual answer
# Rae et al., arXiv:2112.11446, table A1, drop a document with this share of repeated lines.
REPEATED_SHARE = 0.3
# Share of repeats among all runs of this many words; single words recur in any long text.
PHRASE_WORDS, PHRASES_SHARE = 5, 0.6
ALPHANUMERIC_SHARE = 0.5  # least share of letters and digits, in any script, without whitespace
MAX_CHECKED = 20_000  # characters checked of a very long text
MAX_CHECKED_SYMBOLS = 2_000

_REFUSAL = re.compile(
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
_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")
_BLANK = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*")  # whitespace and invisible characters
# Mojibake contains such a pair or letter; is_bad is slow, so other texts skip it.
_MAYBE_MOJIBAKE = re.compile(r"[^\x00-\x7f\u2e80-\uffff]{2}|[ÃÂâ]")


class Finding(NamedTuple):
    """A problem of a row.

    Attributes:
        kind: `empty`, `email`, …
        note: what was found, for the report.
        severity: orders the findings of one kind; the report shows the highest.
    """

    kind: str
    note: str
    severity: float


def check_quality(text: RowText) -> Iterator[Finding]:
    """Yield the quality problems of a row's text."""
    answer = text.answer.strip()
    answered = not _BLANK.fullmatch(answer)
    if not answered or not (text.is_text or not _BLANK.fullmatch(text.question)):
        yield Finding(EMPTY, "no question" if answered else "no answer", 1)
        return
    yield from _check_length(answer, text)
    full = text.full[:MAX_CHECKED]
    yield from _check_repetition(text)
    if garbled := list(_check_encoding(full)):  # its symbols and its end are not the author's
        yield from garbled
        return
    yield from _check_symbols(full)
    if not text.is_text:
        yield from _check_answer(text.question.strip(), answer)


def _check_length(answer: str, text: RowText) -> Iterator[Finding]:
    width = _display_width(answer[:SHORT_CHARACTERS])
    if len(answer) < SHORT_CHARACTERS and width < SHORT_CHARACTERS:
        yield Finding(SHORT, f"{len(answer)} characters: “{answer}”", -len(answer))
    if len(answer) > LONG_CHARACTERS and not text.is_text:
        yield Finding(LONG, f"{len(answer):,} characters", len(answer))


def _check_encoding(text: str) -> Iterator[Finding]:
    if text.isascii():
        return
    if (position := text.find("\ufffd")) >= 0:
        yield Finding(GARBLED, f"replacement character: {excerpt(text, position)}", 1)
    elif _MAYBE_MOJIBAKE.search(text) and is_bad(text):
        yield Finding(GARBLED, "mojibake (wrong text encoding)", 0)


def _check_repetition(text: RowText) -> Iterator[Finding]:
    """Check each side on its own: a long question must not hide an answer that repeats itself."""
    for side in (text.answer, text.question):
        if finding := _find_repetition(side[:MAX_CHECKED]):
            yield finding
            return


def _find_repetition(text: str) -> Finding | None:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    if len(lines) >= 4:
        line, times = Counter(lines).most_common(1)[0]
        repeats = len(lines) - len(set(lines))
        if times > 2 and repeats / len(lines) > REPEATED_SHARE:
            return Finding(REPEATED, f"{times} times “{line[:60]}”", repeats / len(lines))
    words = text.split()
    if len(words) < 50:
        return None
    phrases = Counter(zip(*(words[start:] for start in range(PHRASE_WORDS)), strict=False))
    if 1 - len(phrases) / phrases.total() > PHRASES_SHARE:
        phrase, times = phrases.most_common(1)[0]
        note = f"{times} times “{' '.join(phrase)[:60]}”"
        return Finding(REPEATED, note, phrases.total() - len(phrases))
    return None


def _check_symbols(text: str) -> Iterator[Finding]:
    dense = "".join(text[:MAX_CHECKED_SYMBOLS].split())
    if len(dense) < 20:
        return
    share = len(_NOT_ALPHANUMERIC.sub("", dense)) / len(dense)
    if share < ALPHANUMERIC_SHARE:
        yield Finding(SYMBOLS, f"{1 - share:.0%} are neither letters nor digits", -share)


def _check_answer(question: str, answer: str) -> Iterator[Finding]:
    similar_length = abs(len(question) - len(answer)) < 20
    if similar_length and letters_and_digits(question) == letters_and_digits(answer):
        yield Finding(SAME, f"the answer repeats the question: “{answer[:60]}”", len(answer))
        return
    if match := _REFUSAL.match(answer[:200]):
        yield Finding(REFUSAL, f"“{answer[: match.end() + 40].strip()}…”", 1)
    if is_cut_off(answer):
        in_code = " inside an unclosed code block" if answer.count("```") % 2 else ""
        note = f"ends with “{excerpt(answer, len(answer))}”{in_code}"
        yield Finding(CUT_OFF, note, len(answer))


def is_cut_off(answer: str) -> bool:
    """Whether prose ends inside a sentence, or a code block is not closed.

    Lists, poems and titles end without a full stop too, so only a long last line counts, and only
    in an answer that ends its other sentences.
    """
    if answer.count("```") % 2:
        return True
    last_line = answer.rsplit("\n", 1)[-1]
    if "```" in answer or not _ENDS_OPEN.search(answer):
        return False
    long_enough = _display_width(answer[-60:]) >= 60 and _display_width(last_line[-30:]) >= 30
    return long_enough and bool(_SENTENCE_END.search(answer))


def _display_width(text: str) -> int:
    """The number of characters; CJK characters, which carry more meaning, count twice."""
    return sum(2 if char > "\u2e7f" else 1 for char in text)


def excerpt(text: str, position: int, radius: int = 40) -> str:
    """The text around a position, on one line."""
    start = max(position - radius, 0)
    line = " ".join(text[start : position + radius].split())
    return f"{'…' if start else ''}{line}{'…' if position + radius < len(text) else ''}"


@dataclass(frozen=True)
class RowText:
    """The question and the answer of a row.

    Attributes:
        question: the messages of all roles but the assistant's, joined; empty if `is_text`.
        answer: the assistant's messages, joined; the whole text if `is_text`.
        is_text: the row is plain text without a question.
    """

    question: str
    answer: str
    is_text: bool = False

    @property
    def full(self) -> str:
        """The question and the answer."""
        return self.answer if self.is_text else f"{self.question}\n{self.answer}"


def row_text(value: RowContent) -> RowText:
    """The text of a row; of a preference, its chosen side, or the only side that it has."""
    if isinstance(value, str):
        return RowText("", value, is_text=True)
    conversation = value
    if isinstance(value, Preference):
        conversation = value.chosen or value.rejected or Conversation([])
    assert isinstance(conversation, Conversation)
    answers = [answer_text(m) for m in conversation.messages if m["role"] == "assistant"]
    questions = [m["content"] for m in conversation.messages if m["role"] != "assistant"]
    return RowText("\n".join(questions), "\n".join(answers))


def answer_text(message: dict[str, object]) -> str:
    """An assistant message with its reasoning and its tool calls."""
    reasoning = message.get("reasoning_content")
    tool_calls = message.get("tool_calls")
    return f"{reasoning}\n" * bool(reasoning) + f"{message['content']}{tool_calls or ''}"
