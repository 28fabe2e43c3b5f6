"""Whether two similar texts say the same: templated questions differ in a number or a word.

Shared n-grams cannot distinguish “What is 12 + 34?” from “What is 1 + 234?”, nor the capital of
France from that of Norway in a long sentence. The tokens that decide are numbers with their signs,
operators between operands, and words except function words; markup and punctuation never count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_REPLACED = 12  # tokens in a row; a longer gap is text that was left out
# Of the content tokens: in a long text this many may be replaced, and it is still a copy.
MAX_VARIED_SHARE = 0.02

_OPERATOR = (  # between numbers, parentheses and names of one letter, so it is no markup
    r"(?:(?<=[\d)])|(?<=\b[^\W\d_])) {0,2}[-−+*/^=<>≤≥×÷%](?= {0,2}(?:[-−]?\d|\(|[^\W\d_]\b))"
)
_NUMBER = r"(?:(?<![\w)\]])[-−])?\d+(?:[.,]\d+)*"  # with its sign
_IDEOGRAPH, _WORD = r"(?=\w)[\u2e80-\uffff]", r"[^\W\d_\u2e80-\uffff]+"
_TOKEN = re.compile("|".join((_WORD, _NUMBER, _IDEOGRAPH, _OPERATOR)))
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FUNCTION_WORD_LIST = """
a an the of in on at to for by with from as and or is are was were be been do does did can could
will would please this that these those it its
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


def tokens(text: str) -> list[str]:
    """Words in lower case, numbers, and operators that stand between operands."""
    text = _THOUSANDS.sub("", text.casefold().replace("−", "-"))
    return [token.lstrip(" ") for token in _TOKEN.findall(text)]


def content(words: Iterable[str]) -> list[str]:
    """The tokens that decide what a question asks."""
    return [word for word in words if word not in _FUNCTION_WORDS]


def numbers(words: Iterable[str]) -> list[str]:
    """The numbers and operators."""
    return [word for word in words if not word[0].isalpha()]


@dataclass(frozen=True)
class PassageMatch:
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


def compare(passage: Sequence[str], text: Sequence[str]) -> PassageMatch:
    """Compare the tokens of a passage with those of a text that may contain it."""
    left_out, replaced = _unmatched(passage, text)
    words = sum(passage[at][0].isalpha() for at in replaced if passage[at] not in _FUNCTION_WORDS)
    kept_numbers = numbers(word for at, word in enumerate(passage) if at not in left_out)
    return PassageMatch(
        tokens=len(passage),
        kept=len(passage) - len(left_out) - len(replaced),
        content=len(content(passage)),
        numbers=_missing(kept_numbers, numbers(text)),
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


def _missing(wanted: list[str], others: list[str]) -> int:
    """How many numbers the other text lacks; 1 if it has all of them in another order."""
    rest = iter(others)
    if all(number in rest for number in wanted):
        return 0
    return max(1, (Counter(wanted) - Counter(others)).total())
