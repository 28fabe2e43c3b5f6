"""The digests of a file that a server or a store gives, in the ways they are written.

Content-MD5 (RFC 1864), Digest (RFC 3230), Repr-Digest (RFC 9530), x-goog-hash, x-amz-checksum-*,
the ETag of S3; and what fsspec's clients of other stores say.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.core.hashes import BLOCK_BYTES
from dtrain.core.imports import Late

asyn: Any = Late("fsspec.asyn")

ALGORITHMS = {"md5": "md5", "sha": "sha1", "sha1": "sha1", "sha256": "sha256", "sha512": "sha512"}
PAIRS = re.compile(r"([A-Za-z0-9-]+)=:?([A-Za-z0-9+/]+=*):?")

Digests = dict[str, str]  # algorithm of hashlib → hex


def digests_of(store: Any, path: str, info: dict[str, Any]) -> Digests:
    """Digests that surely are of the whole content.

    Args:
        store: file system of fsspec.
        path: of the file in it.
        info: what the store said of the file.
    """
    said = [(str(key).lower(), value) for key, value in info.items()]
    if "http" in store.protocol:
        said += _headers(store, path)
    return {name: digest for key, value in said for name, digest in _digests(key, value)}


def etag_md5(info: dict[str, Any]) -> str | None:
    """The MD5 that an ETag may be.

    S3 makes it so for objects that were put whole and are not encrypted with a key of one's own;
    other servers write there what they like, which may look the same.
    """
    found = re.fullmatch(r'"?([0-9a-fA-F]{32})"?', str(info.get("ETag") or info.get("etag") or ""))
    return found[1].lower() if found else None


def hash_file(path: Path, algorithms: set[str]) -> Digests:
    """Several hashes of a file in one reading."""
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            for one in hashes.values():
                one.update(block)
    return {name: one.hexdigest() for name, one in hashes.items()}


def _headers(store: Any, path: str) -> list[tuple[str, Any]]:
    """All headers of the file, of which fsspec keeps some; none where the server takes no HEAD."""

    async def ask() -> list[tuple[str, Any]]:
        session = await store.set_session()
        whole = {"Accept-Encoding": "identity"}
        async with session.head(store.encode_url(path), allow_redirects=True, headers=whole) as got:
            plain = got.headers.get("Content-Encoding", "identity") == "identity"
            known = got.headers.items() if got.status == 200 and plain else ()
            return [(key.lower(), value) for key, value in known]

    found: list[tuple[str, Any]] = asyn.sync(store.loop, ask)
    return found


def _digests(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Algorithm and hex digest of each that a header, or a fact that a store gave, holds."""
    if key in ("content-md5", "md5hash", "content_md5"):
        yield from _decoded("md5", value)
    elif key in ("digest", "repr-digest", "x-goog-hash"):
        for name, text in PAIRS.findall(str(value)):
            yield from _decoded(name, text)
    elif key.startswith("x-amz-checksum-"):
        yield from _decoded(key.removeprefix("x-amz-checksum-"), value)
    elif key == "lfs" and isinstance(value, dict) and "sha256" in value:
        yield "sha256", str(value["sha256"])


def _decoded(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Nothing of an algorithm not known here, or of a digest that has not its length."""
    algorithm = ALGORITHMS.get(name.lower().replace("-", ""))
    try:
        content = bytes(value) if isinstance(value, bytes | bytearray) else b64decode(str(value))
    except (binascii.Error, ValueError):
        return
    if algorithm and len(content) == hashlib.new(algorithm, usedforsecurity=False).digest_size:
        yield algorithm, content.hex()
