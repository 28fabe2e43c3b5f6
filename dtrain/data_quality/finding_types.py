"""All that the checks can find in a row, what to call it, and what is usually done about it."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.data_quality import pii, text_checks

BROKEN, TEMPLATE, OVERLONG = "broken", "template", "overlong"
SPECIAL = "special_tokens"
EXACT, NEAR, INCONSISTENT, LEAK = "exact_duplicate", "near_duplicate", "inconsistent", "leak"

# A row's flags are bits in this order.
_ALL_ROWS = (TEMPLATE, OVERLONG, SPECIAL, EXACT, NEAR, INCONSISTENT, LEAK)
FLAGS = (*_ALL_ROWS, *text_checks.KINDS, *pii.KINDS)
BIT = {kind: 1 << number for number, kind in enumerate(FLAGS)}


@dataclass(frozen=True)
class Meaning:
    """How a finding reads in a report.

    Attributes:
        title: what it is called.
        grave: it harms training or people; else it is worth a look.
        advice: what to do about it.
    """

    title: str
    grave: bool
    advice: str


MEANINGS = {
    BROKEN: Meaning("rows that cannot be read", True, "mend them, or clean.broken: quarantine"),
    LEAK: Meaning("rows that hold held-out data", True, "clean.leak: drop, or the evaluation lies"),
    pii.SECRET: Meaning("keys and tokens", True, "clean.personal: mask, and revoke them"),
    pii.ID_NUMBER: Meaning("identity and account numbers", True, "clean.personal: mask"),
    pii.BANK_CARD: Meaning("bank cards", True, "clean.personal: mask"),
    pii.PHONE: Meaning("phone numbers", True, "clean.personal: mask"),
    pii.EMAIL: Meaning("e-mail addresses", True, "clean.personal: mask"),
    pii.IP_ADDRESS: Meaning("IP addresses", True, "clean.personal: mask"),
    TEMPLATE: Meaning("rows that the chat template refuses", True, "mend them: training stops"),
    text_checks.EMPTY: Meaning("empty rows", True, "clean.empty: drop"),
    text_checks.SAME: Meaning("answers that repeat the question", True, "clean.same: drop"),
    EXACT: Meaning("exact duplicates", True, "clean.exact_duplicate: drop"),
    NEAR: Meaning("near duplicates", True, "clean.near_duplicate: quarantine, then look"),
    text_checks.GARBLED: Meaning(
        "garbled characters", True, "clean.garbled: quarantine, then mend"
    ),
    INCONSISTENT: Meaning(
        "questions with several answers", False, "meant? else clean.inconsistent: quarantine"
    ),
    text_checks.REPEATED: Meaning(
        "repeated lines or words", False, "look; clean.repeated_lines: quarantine"
    ),
    text_checks.SYMBOLS: Meaning("mostly symbols", False, "look; clean.symbols: quarantine"),
    text_checks.REFUSAL: Meaning("refusals", False, "meant? else clean.refusal: drop"),
    text_checks.CUT_OFF: Meaning(
        "answers that end in the middle", False, "clean.cut_off: quarantine"
    ),
    OVERLONG: Meaning(
        "rows longer than a sequence", False, "raise sequence_length, or see overlong"
    ),
    SPECIAL: Meaning(
        "special tokens in the text",
        False,
        "plain text to training; meant as tokens? then split_special_tokens: false",
    ),
    text_checks.SHORT: Meaning("very short answers", False, "fine for labels and facts; else look"),
    text_checks.LONG: Meaning("very long answers", False, "look at them"),
}
