"""All that the checks can find in a row, what to call it, and what is usually done about it."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.data.quality import personal, wording

BROKEN, TEMPLATE, OVERLONG = "broken", "template", "overlong"
SPECIAL = "special_tokens"
EXACT, NEAR, INCONSISTENT, LEAK = "exact_duplicate", "near_duplicate", "inconsistent", "leak"

# A row's flags are bits in this order.
_ALL_ROWS = (TEMPLATE, OVERLONG, SPECIAL, EXACT, NEAR, INCONSISTENT, LEAK)
FLAGS = (*_ALL_ROWS, *wording.KINDS, *personal.KINDS)
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
    personal.SECRET: Meaning("keys and tokens", True, "clean.personal: mask, and revoke them"),
    personal.ID_NUMBER: Meaning("identity and account numbers", True, "clean.personal: mask"),
    personal.BANK_CARD: Meaning("bank cards", True, "clean.personal: mask"),
    personal.PHONE: Meaning("phone numbers", True, "clean.personal: mask"),
    personal.EMAIL: Meaning("e-mail addresses", True, "clean.personal: mask"),
    personal.IP_ADDRESS: Meaning("IP addresses", True, "clean.personal: mask"),
    TEMPLATE: Meaning("rows that the chat template refuses", True, "mend them: training stops"),
    wording.EMPTY: Meaning("empty rows", True, "clean.empty: drop"),
    wording.SAME: Meaning("answers that repeat the question", True, "clean.same: drop"),
    EXACT: Meaning("exact duplicates", True, "clean.exact_duplicate: drop"),
    NEAR: Meaning("near duplicates", True, "clean.near_duplicate: quarantine, then look"),
    wording.GARBLED: Meaning("garbled characters", True, "clean.garbled: quarantine, then mend"),
    INCONSISTENT: Meaning(
        "questions with several answers", False, "meant? else clean.inconsistent: quarantine"
    ),
    wording.REPEATED: Meaning(
        "repeated lines or words", False, "look; clean.repeated_lines: quarantine"
    ),
    wording.SYMBOLS: Meaning("mostly symbols", False, "look; clean.symbols: quarantine"),
    wording.REFUSAL: Meaning("refusals", False, "meant? else clean.refusal: drop"),
    wording.CUT_OFF: Meaning("answers that end in the middle", False, "clean.cut_off: quarantine"),
    OVERLONG: Meaning(
        "rows longer than a sequence", False, "raise sequence_tokens, or see overlong"
    ),
    SPECIAL: Meaning(
        "special tokens in the text",
        False,
        "plain text to training; meant as tokens? then split_special_tokens: false",
    ),
    wording.SHORT: Meaning("very short answers", False, "fine for labels and facts; else look"),
    wording.LONG: Meaning("very long answers", False, "look at them"),
}
