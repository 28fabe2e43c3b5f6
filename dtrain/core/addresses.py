"""What addresses must not show: secrets in a message or log, folders in what is published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dtrain.core.errors import UserError

# Each matches in time linear in the text: a text may have 100,000 letters and no scheme.
ADDRESS = re.compile(r"([A-Za-z][\w+.-]{0,40})://([^/?#;\s]*)(\S*)")
NAMED_VALUE = re.compile(r"[?&;#]([^=?&;#/\s]+)=[^&;#\s]")
SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|pwd|signature|credential|apikey|accesskey|auth|jwt|session"
    r"|^(?:key|sig|sas|pass|code)$"
)
USER_INFO = re.compile(r"//[^/@:\s]*:[^/@\s]*@")
LOCAL_PATH = re.compile(r"/|~[\w.-]*/|\.\./|file:|local:")  # not a pattern such as ..(up|down)_proj
CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs", "adl")  # container@account.host/path
FIX = (
    "pass credentials in the environment of the store's client (AWS_PROFILE, OPENAI_API_KEY, …); "
    "a name that contains ?, # or ; cannot be used"
)


def has_secret(text: str) -> bool:
    """Whether a text contains an address with a user, a password, a token or a signature.

    A text that is one address may have neither a query, a fragment nor parameters (`;name=value`):
    what they mean is known to the server alone. In a longer text, or without `scheme://`, their
    names decide.
    """
    forms = {text, unquote(text)}
    alone = len(text.split()) == 1
    return any(_is_secret(word, alone) for form in forms for word in form.split())


def secret_error(where: str) -> UserError:
    """The error for an address with a secret; it does not repeat the address."""
    message = "the address contains a user, password, query or fragment, which would be logged"
    return UserError(message, where=where, fix=FIX)


def without_secret(address: str) -> str:
    """An address for messages: of one with a secret, only its schemes."""
    if not has_secret(address):
        return address
    return "::".join(f"{scheme}://…" for scheme, _, _ in ADDRESS.findall(address)) or "…"


def without_folders(value: Any) -> Any:
    """Settings or a record for other people: of each path outside the run only its last name.

    Args:
        value: of JSON; paths may be values, list items, keys, or parts of a chain such as
            `zip://a.jsonl::/data/b.zip`.
    """
    if isinstance(value, dict):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    parts = value.split("::")
    return "::".join(Path(p).name if LOCAL_PATH.match(p) else p for p in parts)


def _is_secret(word: str, alone: bool) -> bool:
    if USER_INFO.search(word) or any(map(_names_secret, NAMED_VALUE.findall(word))):
        return True
    return any(
        _is_secret_part(part, alone) for url in word.split("::") for part in ADDRESS.findall(url)
    )  # zip://a.jsonl::https://host/b.zip


def _names_secret(name: str) -> bool:
    """Whether a parameter's name, such as X-Amz-Signature, is that of a secret."""
    return bool(SECRET_NAME.search(re.sub(r"[\W_]", "", name.lower())))


def _is_secret_part(part: tuple[str, str, str], alone: bool) -> bool:
    scheme, host, rest = part
    user, at, _ = host.rpartition("@")
    if at and (":" in user or scheme.lower() not in CONTAINER_SCHEMES):
        return True
    _, colon, port = host.rpartition(":")
    if colon and "[" not in host and not at and port and not port.isdigit():
        return True  # a password with a slash in it: https://me:a/b@host
    return alone and bool(re.search("[?#;]", rest))
