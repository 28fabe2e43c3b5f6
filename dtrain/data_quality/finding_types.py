"""Every kind of finding: its flag bit, its title in the report, and the advice for it."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.data import preferences, text_checks
from dtrain.data_quality import pii

BROKEN, TEMPLATE, OVERLONG = "broken", "template", "overlong"
SPECIAL = "special_tokens"
EXACT, NEAR, INCONSISTENT, LEAK = "exact_duplicate", "near_duplicate", "inconsistent", "leak"

# The bits of a row's flags, in this order.
_SCAN_KINDS = (TEMPLATE, OVERLONG, SPECIAL, EXACT, NEAR, INCONSISTENT, LEAK)
_PAIR_KINDS = (preferences.SAME_ANSWERS, preferences.OTHER_PROMPTS)
_FLAGS = (*_SCAN_KINDS, *text_checks.TEXT_KINDS, *pii.PII_KINDS, *_PAIR_KINDS)
FLAG_BITS = {kind: 1 << bit for bit, kind in enumerate(_FLAGS)}


@dataclass(frozen=True)
class FindingType:
    """How a kind of finding reads in a report.

    Attributes:
        title: its name in the report.
        severe: it harms training or people; otherwise it only deserves a review.
        advice: what to do about it.
    """

    title: str
    severe: bool
    advice: str


FINDING_TYPES = {
    BROKEN: FindingType("unreadable rows", True, "fix them, or set clean.broken: quarantine"),
    LEAK: FindingType(
        "rows that contain held-out data", True, "clean.leak: drop; evaluation is invalid otherwise"
    ),
    pii.SECRET: FindingType("keys and tokens", True, "clean.personal: mask, and revoke them"),
    pii.ID_NUMBER: FindingType("identity and account numbers", True, "clean.personal: mask"),
    pii.BANK_CARD: FindingType("bank card numbers", True, "clean.personal: mask"),
    pii.PHONE: FindingType("phone numbers", True, "clean.personal: mask"),
    pii.EMAIL: FindingType("e-mail addresses", True, "clean.personal: mask"),
    pii.IP_ADDRESS: FindingType("IP addresses", True, "clean.personal: mask"),
    TEMPLATE: FindingType(
        "rows that the chat template rejects", True, "fix them: training stops at them"
    ),
    text_checks.EMPTY: FindingType("empty rows", True, "clean.empty: drop"),
    preferences.SAME_ANSWERS: FindingType(
        "pairs of equal answers", True, "remove them: training leaves them out"
    ),
    preferences.OTHER_PROMPTS: FindingType(
        "pairs with different prompts", True, "fix them: training leaves them out"
    ),
    text_checks.SAME: FindingType("answers that repeat the question", True, "clean.same: drop"),
    EXACT: FindingType("exact duplicates", True, "clean.exact_duplicate: drop"),
    NEAR: FindingType(
        "near duplicates", True, "clean.near_duplicate: quarantine, then review them"
    ),
    text_checks.GARBLED: FindingType(
        "garbled characters", True, "clean.garbled: quarantine, then fix the encoding"
    ),
    INCONSISTENT: FindingType(
        "questions with different answers", False, "if unintended: clean.inconsistent: quarantine"
    ),
    text_checks.REPEATED: FindingType(
        "repeated lines or words", False, "review; clean.repeated_lines: quarantine"
    ),
    text_checks.SYMBOLS: FindingType("mostly symbols", False, "review; clean.symbols: quarantine"),
    text_checks.REFUSAL: FindingType("refusals", False, "if unintended: clean.refusal: drop"),
    text_checks.CUT_OFF: FindingType("truncated answers", False, "clean.cut_off: quarantine"),
    OVERLONG: FindingType(
        "rows longer than a sequence", False, "raise sequence_length, or set overlong"
    ),
    SPECIAL: FindingType(
        "special tokens in the text",
        False,
        "trained as plain text; if they are meant as tokens: split_special_tokens: false",
    ),
    text_checks.SHORT: FindingType(
        "very short answers", False, "fine for labels and facts; otherwise review"
    ),
    text_checks.LONG: FindingType("very long answers", False, "review them"),
}
