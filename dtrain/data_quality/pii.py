"""Personal data and secrets in a text.

Patterns alone find too much: whatever has a checksum or a numbering plan is checked by it
(python-stdnum, phonenumbers: both with their tables in the package, so nothing is fetched).
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
KINDS = (EMAIL, PHONE, ID_NUMBER, BANK_CARD, IP_ADDRESS, SECRET)


@dataclass(frozen=True)
class Found:
    """Characters start … stop-1 of a text are personal."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class Pattern:
    """What something looks like, and whether it is it."""

    kind: str
    shape: re.Pattern[str]
    holds: Callable[[str], bool]


def _always(text: str) -> bool:
    return True


def _somebodys(address: str) -> bool:
    """Not of a domain that is kept free for examples (RFC 2606)."""
    domain = address.rpartition("@")[2].lower()
    return not re.search(r"(^|\.)(example\.(com|org|net)|example|invalid|test|localhost)$", domain)


# First digits and lengths that the networks give out; Luhn alone passes one number in ten.
_ISSUED = re.compile(
    r"4(?:\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|(?:6011|64[4-9]\d|65\d\d)\d{12}"
    r"|62\d{14,17}|35\d{14}|3[068]\d{12}|(?:50|5[6-9]|6[037])\d{14}"
)


def _card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return bool(_ISSUED.fullmatch(digits) and len(set(digits)) > 1 and luhn.is_valid(digits))


def _chinese_id(text: str) -> bool:
    """A day of birth and the check digit.

    Not `ric.is_valid`: it wants the district to be older than its people, but numbers were given
    out long after birth, under the district's name of that day.
    """
    try:
        ric.get_birth_date(text)
        return bool(ric.calc_check_digit(text) == text[-1].upper())
    except ValidationError:
        return False


def _phone(region: str | None) -> Callable[[str], bool]:
    def holds(text: str) -> bool:
        try:
            return bool(phonenumbers.is_valid_number(phonenumbers.parse(text, region)))
        except phonenumbers.NumberParseException:
            return False

    return holds


def _global_address(text: str) -> bool:
    """Private, local and documentation addresses tell nothing of anybody."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


_D = r"(?<![\d.\-])"  # no digit before
_E = r"(?![\d]|[.\-]\d)"  # no digit after
_NARROW = r"[^\W\u2e80-\U0010ffff]"  # of a word, and of no script that sets no blanks between words


def _shape(text: str) -> re.Pattern[str]:
    """Next to a Chinese character a number or a key begins and ends as it does next to a blank."""
    return re.compile(text, re.ASCII)


# In order: what an earlier one has taken is not looked at by a later one.
PATTERNS = (
    Pattern(
        EMAIL,
        re.compile(
            _NARROW + f"(?:{_NARROW}|[.+-]){{0,63}}" r"@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}"
        ),
        _somebodys,
    ),
    Pattern(
        SECRET,
        _shape(
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
    Pattern(ID_NUMBER, _shape(_D + r"[1-9]\d{16}[\dXx](?![\dA-Za-z])"), _chinese_id),
    Pattern(
        ID_NUMBER,
        _shape(r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2,7}[A-Z\d ]{0,4}"),
        iban.is_valid,
    ),
    Pattern(ID_NUMBER, _shape(_D + r"\d{3}-\d{2}-\d{4}" + _E), ssn.is_valid),
    Pattern(ID_NUMBER, _shape(_D + r"\d{3}\.\d{3}\.\d{3}-\d{2}" + _E), cpf.is_valid),
    Pattern(
        ID_NUMBER,
        _shape(_D + r"(?<!\d )[2-9]\d{3} \d{4} \d{4}(?! ?\d)"),
        aadhaar.is_valid,
    ),
    Pattern(ID_NUMBER, _shape(_D + r"\d{3} \d{3} \d{4}" + _E), nhs.is_valid),
    Pattern(
        ID_NUMBER,
        _shape(_D + r"[12] ?\d{2} ?\d{2} ?\d{2} ?\d{3} ?\d{3} ?\d{2}" + _E),
        nir.is_valid,
    ),
    Pattern(ID_NUMBER, _shape(r"\b\d{8}-?[A-HJ-NP-TV-Z]\b"), dni.is_valid),
    Pattern(ID_NUMBER, _shape(r"\b[XYZ]-?\d{7}-?[A-Z]\b"), nie.is_valid),
    Pattern(
        ID_NUMBER,
        _shape(r"\b[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]\b"),
        codicefiscale.is_valid,
    ),
    Pattern(BANK_CARD, _shape(_D + r"[2-6]\d{3}(?:[ -]?\d{2,6}){2,4}" + _E), _card),
    Pattern(PHONE, _shape(r"(?<![\w+])\+\d[\d ().-]{7,20}\d" + _E), _phone(None)),
    Pattern(PHONE, _shape(_D + r"1[3-9]\d[ -]?\d{4}[ -]?\d{4}" + _E), _phone("CN")),
    Pattern(PHONE, _shape(_D + r"0\d{2,3}-\d{7,8}" + _E), _phone("CN")),
    Pattern(
        PHONE,
        _shape(r"(?<![\d.\w-])\(?\d{3}\)?[-. ]\d{3}[-. ]\d{4}" + _E),
        _phone("US"),
    ),
    Pattern(IP_ADDRESS, _shape(_D + r"(?:\d{1,3}\.){3}\d{1,3}" + _E), _global_address),
    Pattern(
        IP_ADDRESS,
        _shape(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){3,7}[0-9A-Fa-f:]{1,9}"),
        _global_address,
    ),
)
_SECRET_HEADS = (
    "PRIVATE KEY-----,AKIA,ASIA,ghp_,gho_,ghu_,ghs_,ghr_,github_pat_,glpat-,hf_,sk-,xox,"
)
_SECRET_HEADS += "AIza,eyJ,k_live_,npm_,pypi-,SG."
_SECRETS = tuple(_SECRET_HEADS.split(","))
_NUMBERS = re.compile(r"\d(?:[ ().-]{0,2}\d){7}|\d\.\d{1,3}\.\d")  # what every number above has


def find(text: str) -> list[Found]:
    """Personal data in a text, in order of place; no two overlap."""
    found: list[Found] = []
    for pattern in _worth_trying(text):
        for match in pattern.shape.finditer(text):
            start, stop = match.start(), _stop(match.group(), pattern) + match.start()
            free = all(stop <= other.start or start >= other.stop for other in found)
            if free and stop > start:
                found.append(Found(pattern.kind, start, stop))
    return sorted(found, key=lambda one: one.start)


def _stop(shape: str, pattern: Pattern) -> int:
    """Where the find ends in what has its shape; 0 if there is none.

    A number may be followed by another, or by a word in capitals: it ends at one of the blanks.
    """
    shape = shape.rstrip(" (")
    while shape and not pattern.holds(shape):
        shape = shape.rpartition(" ")[0].rstrip(" (")
    return len(shape)


def _worth_trying(text: str) -> Iterator[Pattern]:
    """Most texts hold neither an @ nor a long number: their patterns are then not tried."""
    numbers = bool(_NUMBERS.search(text))
    for pattern in PATTERNS:
        if pattern.kind == EMAIL:
            worth = "@" in text
        elif pattern.kind == SECRET:
            worth = any(head in text for head in _SECRETS)
        else:
            worth = numbers or (pattern is PATTERNS[-1] and text.count(":") > 2)
        if worth:
            yield pattern


def mask(text: str) -> str:
    """The text with each find replaced by its kind in brackets."""
    out, place = [], 0
    for one in find(text):
        out += [text[place : one.start], f"[{one.kind}]"]
        place = one.stop
    return "".join([*out, text[place:]])


def hidden(text: str, one: Found) -> str:
    """A find as a report may show it: head and tail, the rest as stars."""
    value = text[one.start : one.stop]
    shown = min(3, len(value) // 4)
    return value[:shown] + "*" * min(len(value) - 2 * shown, 12) + value[len(value) - shown :]
