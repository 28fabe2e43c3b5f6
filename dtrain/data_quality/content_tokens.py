"""Whether two similar texts say the same: templated questions differ in a number or a word.

Shared n-grams cannot tell “What is 12 + 34?” from “What is 1 + 234?”, nor the capital of France
from that of Norway in a long sentence. The tokens that decide are numbers with their signs,
operators between operands, and words except function words; markup and punctuation never count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_REPLACED = 12  # tokens in a row; a longer gap is text that was left out
# Of the content tokens: in a long text this many may be replaced, and it is still a copy.
MAX_VARIED_SHARE = 0.02

_TOKEN = re.compile(
    r"(?:(?<![\w)\]])[-−])?\d+(?:[.,]\d+)*"  # a number with its sign
    r"|[\u2e80-\uffff]"  # a character of a script without spaces
    r"|[^\W\d_\u2e80-\uffff]+"
    r"|[-−+*/^=<>≤≥×÷%]"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FUNCTION_WORD_LIST = """
a an the of in on at to for by with from as and or is are was were be been do does did can could
will would please this that these those it its
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


def tokens(text: str) -> list[str]:
    """Words in lower case, numbers, and operators that stand between operands."""
    return list(_tokens(text))


def _tokens(text: str) -> Iterator[str]:
    for match in _TOKEN.finditer(text.casefold()):
        token = match.group()
        if token[-1].isdigit():
            yield _THOUSANDS.sub("", token).replace("−", "-")
        elif token[0].isalpha() or _is_operator(text, match):
            yield token.replace("−", "-")


def _is_operator(text: str, match: re.Match[str]) -> bool:
    """Whether a sign stands between operands, at least one of them no word: not markup."""
    before = text[max(match.start() - 8, 0) : match.start()].rstrip(" ")
    after = text[match.end() : match.end() + 8].lstrip(" ")
    sides = (_operand(before[::-1]), _operand(after))
    return all(sides) and "word" not in sides


def _operand(text: str) -> str:
    """What the characters next to a sign are: a number, a name, a word, or "" for none."""
    if text[:1].isdigit() or text[:1] in ("(", ")"):
        return "number"
    if not text[:1].isalpha():
        return ""
    return "name" if not text[1:2].isalpha() else "word"


def is_number(token: str) -> bool:
    """Whether a token is a number or an operator."""
    return not token[0].isalpha()


def is_content(token: str) -> bool:
    """Whether a token decides what a question asks."""
    return token not in _FUNCTION_WORDS


@dataclass(frozen=True)
class Comparison:
    """How much of a passage a text contains, and what the text says in its place.

    Attributes:
        tokens: of the passage.
        kept: those that stand in the text next to a neighbor of the passage.
        content: tokens of the passage that decide what it says.
        numbers, words: those of them that the text replaces by others.
    """

    tokens: int
    kept: int
    content: int
    numbers: int
    words: int

    @property
    def share(self) -> float:
        """The share of the passage that the text contains."""
        return self.kept / max(self.tokens, 1)

    @property
    def is_varied(self) -> bool:
        """Whether the text says something else in the passage's words."""
        return self.numbers + self.words > MAX_VARIED_SHARE * self.content


def compare(passage: Sequence[str], text: Sequence[str]) -> Comparison:
    """Compare the tokens of a passage with those of a text that may contain it."""
    left_out, replaced = _unmatched(passage, text)
    words = sum(is_content(passage[at]) for at in replaced if not is_number(passage[at]))
    numbers = [t for at, t in enumerate(passage) if is_number(t) and at not in left_out]
    return Comparison(
        tokens=len(passage),
        kept=len(passage) - len(left_out) - len(replaced),
        content=sum(is_content(token) for token in passage),
        numbers=_missing(numbers, [token for token in text if is_number(token)]),
        words=words,
    )


def _unmatched(passage: Sequence[str], text: Sequence[str]) -> tuple[set[int], set[int]]:
    """Indices of the tokens that a text leaves out, and of those that it replaces.

    Three tokens in a row match by chance too rarely to break a long gap in two; two of them match
    what stands around a word that was added or removed.
    """
    left_out, replaced = set[int](), set[int]()
    near, far = _in_shared_runs(passage, text, 2), _in_shared_runs(passage, text, 3)
    gap: list[int] = []
    for at in range(len(passage) + 1):
        if at < len(passage) and at not in far:
            gap.append(at)
            continue
        if len(gap) > MAX_REPLACED:
            left_out.update(gap)
        else:
            replaced.update(set(gap) - near)
        gap = []
    return left_out, replaced


def _in_shared_runs(passage: Sequence[str], text: Sequence[str], length: int) -> set[int]:
    """Indices of the passage's tokens in runs of a length that the text contains too."""
    length = min(length, len(passage))
    runs = {tuple(text[at : at + length]) for at in range(len(text) - length + 1)}
    shared = set[int]()
    for at in range(len(passage) - length + 1):
        if tuple(passage[at : at + length]) in runs:
            shared.update(range(at, at + length))
    return shared


def _missing(numbers: list[str], others: list[str]) -> int:
    """How many numbers the other text lacks; 1 if it has all of them in another order."""
    rest = iter(others)
    if all(number in rest for number in numbers):
        return 0
    return max(1, (Counter(numbers) - Counter(others)).total())
