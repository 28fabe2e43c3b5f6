"""Files at an address such as s3://bucket/rows/*.jsonl or https://host/rows.jsonl, by fsspec.

They are copied into the cache once, so that every reader, process and later run finds plain files.
A copy is compared with the length and the digests that the server gave, and with its own hash
before each use.
Credentials come from where the store's own client looks for them, never from the address.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import re
import tempfile
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any

from blake3 import blake3

from dtrain.core.errors import UserError
from dtrain.core.files import fsync_folder, read_json, write_json
from dtrain.core.hash_cache import CACHE_FROM_BYTES, FileIdentity, file_state, remember_hash
from dtrain.core.hashes import BLOCK_BYTES, fingerprint
from dtrain.core.lazy_import import LazyModule
from dtrain.core.locks import FolderLock
from dtrain.core.log import progress, say

fsspec: Any = LazyModule("fsspec")
OWN = "blake3"  # the hash that dtrain records; servers publish others

# What tells one version of a file from the next, in the words of the various stores.
MARKS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created", "generation", "md5")


def is_remote(address: str) -> bool:
    """Whether an address is one of fsspec's."""
    return "://" in address


def fetch(address: str, cache: Path, readable: Callable[[Path], object]) -> list[tuple[str, Path]]:
    """Copy the files at an address into the cache, those that are not there yet.

    Args:
        address: of a file, a folder or a glob.
        cache: folder of the copies.
        readable: whether a file of a folder is one to copy, by its name.

    Returns:
        Address and copy of each file, in order.

    Raises:
        UserError: the address holds a secret, or cannot be read.
    """
    _refuse_secrets(address)
    known = cache / "remote" / f"{fingerprint(address)[:32]}.json"
    try:
        store, path = fsspec.core.url_to_fs(address)
        files = [
            (store.unstrip_protocol(p), store.info(p), p) for p in _found(store, path, readable)
        ]
    except Exception as raised:  # each store's client raises its own kinds
        error = _root(raised)
        if known.exists() and not _is_missing(raised, error):
            say(f"{address}: cannot be reached, taking what was fetched before")
            return _fetched_before(known, address)
        raise _unreadable(address, error) from error
    with progress(f"fetching {address}", sum(info.get("size") or 0 for _, info, _ in files)) as bar:
        copies = []
        for name, info, path in files:
            copies.append((name, _copy(store, path, info, name, cache, address)))
            bar.advance(info.get("size") or 0)
    write_json(known, [[name, str(copy)] for name, copy in copies])
    return copies


def _fetched_before(known: Path, address: str) -> list[tuple[str, Path]]:
    copies = [(name, Path(copy)) for name, copy in read_json(known)]
    for name, copy in copies:
        if not _is_whole(copy):
            what = "cannot be reached, and what was fetched before is damaged"
            raise UserError(f"{what}: {copy}", where=name, fix="start again when it can be reached")
    return copies


def _found(store: Any, path: str, readable: Callable[[Path], object]) -> list[str]:
    if has_magic(path):
        return sorted(p for p in store.glob(path) if not store.isdir(p))
    if "http" in store.protocol or not store.isdir(path):  # a web server has pages, not folders
        return [path]
    found = (p for p in store.find(path) if readable(Path(p)))
    return sorted(p for p in found if not Path(p).name.startswith("."))


def _copy(
    store: Any, path: str, info: dict[str, Any], name: str, cache: Path, address: str
) -> Path:
    marks = {key: str(info[key]) for key in MARKS if info.get(key) is not None}
    folder = cache / "remote" / fingerprint([name, info.get("size"), marks])[:32]
    copy = folder / Path(path).name
    if marks and _is_whole(copy):  # without a mark nothing shows whether it has changed
        return copy
    with FolderLock(folder):  # of several processes one fetches, and the others find the copy
        if not (marks and _is_whole(copy)):
            try:
                _get(store, path, copy, info, name)
            except UserError:
                raise
            except Exception as error:
                raise _unreadable(address, _root(error)) from error
    return copy


def _is_whole(copy: Path) -> bool:
    """Whether a copy is there and holds what was fetched."""
    with suppress(UserError, OSError, KeyError, TypeError):
        record = read_json(_record(copy))
        return (
            copy.stat().st_size == record["bytes"] and FileIdentity.of(copy).digest == record[OWN]
        )
    return False


def _record(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.fetched")


def _get(store: Any, path: str, copy: Path, info: dict[str, Any], name: str) -> None:
    """Fetch a file; once more if what came is not what the server says it has.

    Raises:
        UserError: it is not that twice.
    """
    digests, etag = digests_of(store, path, info), etag_md5(info)
    seen, fault = list[str](), ""
    for _ in range(2):
        handle, temporary = tempfile.mkstemp(prefix=".", dir=copy.parent)
        os.close(handle)
        try:
            store.get_file(path, temporary)
            found = hash_file(Path(temporary), {OWN, *digests, *(["md5"] if etag else [])})
            fault = _difference(Path(temporary), found, info, digests)
            # An ETag may look like an MD5 and be none: that of what comes twice the same.
            if not fault and etag not in (None, found.get("md5")) and found[OWN] not in seen:
                fault = "its MD5 is not the ETag"
            if not fault:
                _keep(Path(temporary), copy, found[OWN])
                return
            seen += [found[OWN]]
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    fix = "start again; if it happens again, ask the owner of the file"
    raise UserError(f"what the server sends is damaged: {fault}", where=name, fix=fix)


def _difference(path: Path, found: Digests, info: dict[str, Any], digests: Digests) -> str:
    """What is other than the server said; empty if nothing is."""
    size, came = info.get("size"), path.stat().st_size
    if size is not None and came != size:
        return f"{came:,} bytes came of {size:,}"
    wrong = [name for name, digest in digests.items() if found[name] != digest]
    return f"its {wrong[0]} is not the one that the server gave" if wrong else ""


def _keep(temporary: Path, copy: Path, digest: str) -> None:
    """Put a fetched file in place, on the disk before it has its name, and record its hash."""
    if _is_whole(copy) and read_json(_record(copy))[OWN] == digest:
        return  # others may be reading it
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    _record(copy).unlink(missing_ok=True)
    os.replace(temporary, copy)
    fsync_folder(copy.parent)
    size = copy.stat().st_size
    if size >= CACHE_FROM_BYTES:
        remember_hash(copy, digest, file_state(copy), written_here=True)
    write_json(_record(copy), {OWN: digest, "bytes": size})


def _refuse_secrets(address: str) -> None:
    parts = [_without_secret(part) for part in address.split("::")]  # zip://a.jsonl::https://host/b
    if any(secret for _, secret in parts):
        raise UserError(
            "the address holds a user, password or query, which would be logged",
            where="::".join(bare for bare, _ in parts),
            fix="give credentials where the store's client looks for them, such as AWS_PROFILE",
        )


def _without_secret(part: str) -> tuple[str, bool]:
    """One part of an address without what could be a secret, and whether it held any."""
    place, _, query = part.partition("?")
    scheme, mark, rest = place.rpartition("://")
    host, slash, path = rest.partition("/")
    _, at, bare = host.rpartition("@")
    return f"{scheme}{mark}{bare}{slash}{path}", bool(at or query)


def _root(error: BaseException) -> BaseException:
    """What lies behind: fsspec says that there is no file where there is no server either."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return error if cause is None else _root(cause)


def _is_missing(error: Exception, root: BaseException) -> bool:
    """Whether the store answered that there is no such file."""
    no_answer = isinstance(root, OSError) and not isinstance(root, FileNotFoundError)
    return isinstance(error, FileNotFoundError) and not no_answer


def _unreadable(address: str, error: BaseException) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return UserError(
        f"cannot be read: {reason}",
        where=address,
        fix="correct `path`; credentials come from the environment, and a store may need its "
        "fsspec package (s3fs, gcsfs, …)",
    )


asyn: Any = LazyModule("fsspec.asyn")

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
    hashes = {
        name: blake3() if name == OWN else hashlib.new(name, usedforsecurity=False)
        for name in algorithms
    }
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
