"""Find and mask personal data and secrets in a text.

Patterns alone match too much, so anything with a checksum or a numbering plan is validated against
it (python-stdnum and phonenumbers, which ship their tables: nothing is downloaded).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import phonenumbers
from stdnum import iban, luhn
from stdnum.br import cpf
from stdnum.cn import ric
from stdnum.es import dni, nie
from stdnum.exceptions import ValidationError
from stdnum.fr import nir
from stdnum.gb import nhs
from stdnum.in_ import aadhaar
from stdnum.it import codicefiscale
from stdnum.us import ssn

EMAIL, PHONE, ID_NUMBER, BANK_CARD = "email", "phone", "id_number", "bank_card"
IP_ADDRESS, SECRET = "ip_address", "secret"
PII_KINDS = (EMAIL, PHONE, ID_NUMBER, BANK_CARD, IP_ADDRESS, SECRET)


@dataclass(frozen=True)
class PiiMatch:
    """Characters [start, stop) of a text are personal data of this kind."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class PiiPattern:
    """A regular expression for candidates, and a check that accepts or rejects each of them."""

    kind: str
    regex: re.Pattern[str]
    is_valid: Callable[[str], bool]


def _always(text: str) -> bool:
    return True


def _is_real_email(address: str) -> bool:
    """Reject the domains that RFC 2606 reserves for examples."""
    domain = address.rpartition("@")[2].lower()
    return not re.search(r"(^|\.)(example\.(com|org|net)|example|invalid|test|localhost)$", domain)


# Prefixes and lengths that card networks issue; Luhn alone accepts one number in ten.
_ISSUED_CARD = re.compile(
    r"4(?:\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|(?:6011|64[4-9]\d|65\d\d)\d{12}"
    r"|62\d{14,17}|35\d{14}|3[068]\d{12}|(?:50|5[6-9]|6[037])\d{14}"
)


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return bool(_ISSUED_CARD.fullmatch(digits) and len(set(digits)) > 1 and luhn.is_valid(digits))


def _is_chinese_id(text: str) -> bool:
    """Check the date of birth and the check digit.

    `ric.is_valid` is stricter: it requires the district to exist at the date of birth, but numbers
    were issued long after birth, under the district code of the day of issue.
    """
    try:
        ric.get_birth_date(text)
        return bool(ric.calc_check_digit(text) == text[-1].upper())
    except ValidationError:
        return False


def _is_phone(region: str | None) -> Callable[[str], bool]:
    def is_valid(text: str) -> bool:
        try:
            return bool(phonenumbers.is_valid_number(phonenumbers.parse(text, region)))
        except phonenumbers.NumberParseException:
            return False

    return is_valid


def _is_global_address(text: str) -> bool:
    """Private, local and documentation addresses do not identify anyone."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


_D = r"(?<![\d.\-])"  # no digit before
_E = r"(?![\d]|[.\-]\d)"  # no digit after
_WORD = r"[^\W\u2e80-\U0010ffff]"  # a word character of a script that separates words by spaces


def _ascii_regex(pattern: str) -> re.Pattern[str]:
    """ASCII only, so that a CJK character next to a number or key counts as a word boundary."""
    return re.compile(pattern, re.ASCII)


# Earlier patterns take precedence where two match the same characters.
PATTERNS = (
    PiiPattern(
        EMAIL,
        re.compile(_WORD + f"(?:{_WORD}|[.+-]){{0,63}}" r"@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}"),
        _is_real_email,
    ),
    PiiPattern(
        SECRET,
        _ascii_regex(
            r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----"
            r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
            r"|\bgh[pousr]_[A-Za-z0-9]{36,255}\b"
            r"|\bgithub_pat_\w{60,100}\b"
            r"|\bglpat-[\w-]{20}\b"
            r"|\bhf_[A-Za-z0-9]{30,40}\b"
            r"|\bsk-(?:proj-|ant-)?[\w-]{20,200}\b"
            r"|\b[rs]k_live_[A-Za-z0-9]{20,100}\b"
            r"|\bnpm_[A-Za-z0-9]{36}\b"
            r"|\bpypi-[\w-]{50,200}\b"
            r"|\bSG\.[\w-]{22}\.[\w-]{43}\b"
            r"|\bxox[abprs]-[\w-]{10,100}\b"
            r"|\bAIza[\w-]{35}\b"
            r"|\beyJ[\w-]{10,1000}\.eyJ[\w-]{10,4000}\.[\w-]{10,1000}\b"
        ),
        _always,
    ),
    PiiPattern(ID_NUMBER, _ascii_regex(_D + r"[1-9]\d{16}[\dXx](?![\dA-Za-z])"), _is_chinese_id),
    PiiPattern(
        ID_NUMBER,
        _ascii_regex(r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2,7}[A-Z\d ]{0,4}"),
        iban.is_valid,
    ),
    PiiPattern(ID_NUMBER, _ascii_regex(_D + r"\d{3}-\d{2}-\d{4}" + _E), ssn.is_valid),
    PiiPattern(ID_NUMBER, _ascii_regex(_D + r"\d{3}\.\d{3}\.\d{3}-\d{2}" + _E), cpf.is_valid),
    PiiPattern(
        ID_NUMBER,
        _ascii_regex(_D + r"(?<!\d )[2-9]\d{3} \d{4} \d{4}(?! ?\d)"),
        aadhaar.is_valid,
    ),
    PiiPattern(ID_NUMBER, _ascii_regex(_D + r"\d{3} \d{3} \d{4}" + _E), nhs.is_valid),
    PiiPattern(
        ID_NUMBER,
        _ascii_regex(_D + r"[12] ?\d{2} ?\d{2} ?\d{2} ?\d{3} ?\d{3} ?\d{2}" + _E),
        nir.is_valid,
    ),
    PiiPattern(ID_NUMBER, _ascii_regex(r"\b\d{8}-?[A-HJ-NP-TV-Z]\b"), dni.is_valid),
    PiiPattern(ID_NUMBER, _ascii_regex(r"\b[XYZ]-?\d{7}-?[A-Z]\b"), nie.is_valid),
    PiiPattern(
        ID_NUMBER,
        _ascii_regex(r"\b[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]\b"),
        codicefiscale.is_valid,
    ),
    PiiPattern(BANK_CARD, _ascii_regex(_D + r"[2-6]\d{3}(?:[ -]?\d{2,6}){2,4}" + _E), _is_card),
    PiiPattern(PHONE, _ascii_regex(r"(?<![\w+])\+\d[\d ().-]{7,20}\d" + _E), _is_phone(None)),
    PiiPattern(PHONE, _ascii_regex(_D + r"1[3-9]\d[ -]?\d{4}[ -]?\d{4}" + _E), _is_phone("CN")),
    PiiPattern(PHONE, _ascii_regex(_D + r"0\d{2,3}-\d{7,8}" + _E), _is_phone("CN")),
    PiiPattern(
        PHONE,
        _ascii_regex(r"(?<![\d.\w-])\(?\d{3}\)?[-. ]\d{3}[-. ]\d{4}" + _E),
        _is_phone("US"),
    ),
    PiiPattern(IP_ADDRESS, _ascii_regex(_D + r"(?:\d{1,3}\.){3}\d{1,3}" + _E), _is_global_address),
    PiiPattern(
        IP_ADDRESS,
        _ascii_regex(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){3,7}[0-9A-Fa-f:]{1,9}"),
        _is_global_address,
    ),
)
_SECRET_PREFIXES = (
    "PRIVATE KEY-----,AKIA,ASIA,ghp_,gho_,ghu_,ghs_,ghr_,github_pat_,glpat-,hf_,sk-,xox,"
)
_SECRET_PREFIXES += "AIza,eyJ,k_live_,npm_,pypi-,SG."
_SECRET_MARKERS = tuple(_SECRET_PREFIXES.split(","))
_NUMBER = re.compile(r"\d(?:[ ().-]{0,2}\d){7}|\d\.\d{1,3}\.\d")  # in every number matched above


def find_pii(text: str) -> list[PiiMatch]:
    """Personal data in a text, in order of position and without overlaps."""
    matches: list[PiiMatch] = []
    for pattern in _candidate_patterns(text):
        for candidate in pattern.regex.finditer(text):
            start = candidate.start()
            stop = start + _valid_length(candidate.group(), pattern)
            free = all(stop <= match.start or start >= match.stop for match in matches)
            if free and stop > start:
                matches.append(PiiMatch(pattern.kind, start, stop))
    return sorted(matches, key=lambda match: match.start)


def _valid_length(candidate: str, pattern: PiiPattern) -> int:
    """The length of the longest valid prefix that ends at a space; 0 if there is none.

    Another number or a capitalized word may follow a number and match the same regex.
    """
    candidate = candidate.rstrip(" (")
    while candidate and not pattern.is_valid(candidate):
        candidate = candidate.rpartition(" ")[0].rstrip(" (")
    return len(candidate)


def _candidate_patterns(text: str) -> Iterator[PiiPattern]:
    """Skip the patterns that cannot match: most texts contain neither an @ nor a long number."""
    has_number = bool(_NUMBER.search(text))
    for pattern in PATTERNS:
        if pattern.kind == EMAIL:
            possible = "@" in text
        elif pattern.kind == SECRET:
            possible = any(marker in text for marker in _SECRET_MARKERS)
        else:
            possible = has_number or (pattern is PATTERNS[-1] and text.count(":") > 2)
        if possible:
            yield pattern


def mask_pii(text: str) -> str:
    """Replace each match by its kind in brackets."""
    masked, position = [], 0
    for match in find_pii(text):
        masked += [text[position : match.start], f"[{match.kind}]"]
        position = match.stop
    return "".join([*masked, text[position:]])


def redact(text: str, match: PiiMatch) -> str:
    """A match as a report may show it: its first and last characters, asterisks between them."""
    value = text[match.start : match.stop]
    visible = min(3, len(value) // 4)
    asterisks = "*" * min(len(value) - 2 * visible, 12)
    return value[:visible] + asterisks + value[len(value) - visible :]
