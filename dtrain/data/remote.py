"""Download files from URLs such as s3://bucket/rows/*.jsonl or https://host/rows.jsonl, by fsspec.

Files are downloaded into the cache once, so that readers need only local files. A copy is checked
against the size and the digests of the server, and against its own hash before each use.
Credentials come from the environment of the store's client, never from the URL.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import re
import tempfile
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any

from blake3 import blake3
from pydantic import Field

from dtrain.core.addresses import has_secret, secret_error, without_secret
from dtrain.core.errors import UserError, first_line
from dtrain.core.files import fsync_folder, read_json, write_json
from dtrain.core.hash_cache import CACHE_FROM_BYTES, FileIdentity, file_state, remember_hash
from dtrain.core.hashes import BLOCK_BYTES, fingerprint
from dtrain.core.lazy_import import LazyModule
from dtrain.core.locks import FolderLock
from dtrain.core.log import progress, say

fsspec: Any = LazyModule("fsspec")
aiohttp: Any = LazyModule("aiohttp")
REDIRECT_HOSTS = "DTRAIN_REDIRECT_HOSTS"  # servers that others may redirect to, with spaces between
OWN = "blake3"  # the hash that dtrain records; servers publish others

# Keys with which various stores identify a version of a file.
VERSION_KEYS = (
    "ETag",
    "etag",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
    "generation",
    "md5",
)


def is_remote(address: str) -> bool:
    """Whether an address is a URL for fsspec."""
    return "://" in address


# Of the names of a folder's files, and the folder: those to read, in order.
SelectFiles = Callable[[Iterable[Path], str], list[Path]]


def fetch(address: str, cache: Path, select: SelectFiles) -> list[tuple[str, Path]]:
    """Download the files at a URL that are not in the cache yet.

    Args:
        address: URL of a file, a folder or a glob.
        cache: folder of the copies.
        select: which files of a folder to download.

    Returns:
        URL and copy of each file, in order.

    Raises:
        UserError: the URL contains a secret, or cannot be read.
    """
    if has_secret(address):
        raise secret_error(without_secret(address))
    known = cache / "remote" / f"{fingerprint(address)[:32]}.json"
    try:
        store, path = fsspec.core.url_to_fs(address, **_http_options(address))
        files = [
            (store.unstrip_protocol(p), store.info(p), p)
            for p in _found(store, path, address, select)
        ]
    except Exception as raised:  # each store's client raises its own types
        error = _root(raised)
        if isinstance(error, UserError):
            raise error from None
        if known.exists() and not _is_missing(raised, error):
            say(f"{address}: cannot be reached, using the earlier download")
            return _earlier_download(known)
        raise _unreadable(address, error) from error
    with progress(
        f"downloading {address}", sum(info.get("size") or 0 for _, info, _ in files)
    ) as bar:
        copies = []
        for name, info, path in files:
            copies.append((name, _copy(store, path, info, name, cache, address)))
            bar.advance(info.get("size") or 0)
    write_json(known, [[name, str(copy)] for name, copy in copies])
    return copies


def _earlier_download(known: Path) -> list[tuple[str, Path]]:
    records = read_json(known, list[Annotated[list[str], Field(min_length=2, max_length=2)]])
    copies = [(name, Path(copy)) for name, copy in records]
    for name, copy in copies:
        if not _is_whole(copy):
            message = "cannot be reached, and the earlier download is damaged"
            raise UserError(
                f"{message}: {copy}", where=name, fix="try again when it can be reached"
            )
    return copies


def _found(store: Any, path: str, address: str, select: SelectFiles) -> list[str]:
    if has_magic(path):
        return sorted(p for p in store.glob(path) if not store.isdir(p))
    if "http" in store.protocol or not store.isdir(path):  # a web server has no folders
        return [path]
    names = {Path(p.removeprefix(path).lstrip("/")): p for p in store.find(path)}
    return [names[name] for name in select(names, address)]


def _copy(
    store: Any, path: str, info: dict[str, Any], name: str, cache: Path, address: str
) -> Path:
    version = {key: str(info[key]) for key in VERSION_KEYS if info.get(key) is not None}
    folder = cache / "remote" / fingerprint([name, info.get("size"), version])[:32]
    copy = folder / Path(path).name
    if version and _is_whole(copy):  # otherwise a change would go unnoticed
        return copy
    with FolderLock(folder):  # one of several processes downloads
        if not (version and _is_whole(copy)):
            try:
                _download(store, path, copy, info, name)
            except Exception as raised:
                error = _root(raised)
                raise (
                    error if isinstance(error, UserError) else _unreadable(address, error)
                ) from raised
    return copy


def _is_whole(copy: Path) -> bool:
    """Whether a copy exists and is what was downloaded."""
    with suppress(UserError, OSError, KeyError, TypeError):
        record = read_json(_record(copy))
        return (
            copy.stat().st_size == record["bytes"] and FileIdentity.of(copy).digest == record[OWN]
        )
    return False


def _record(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.fetched")


def _download(store: Any, path: str, copy: Path, info: dict[str, Any], name: str) -> None:
    """Download a file; try again once if it differs from what the server says.

    Raises:
        UserError: it differs twice.
    """
    digests, etag = digests_of(store, path, info), etag_md5(info)
    seen, fault = list[str](), ""
    for _ in range(2):
        handle, temporary = tempfile.mkstemp(prefix=".", dir=copy.parent)
        os.close(handle)
        try:
            store.get_file(path, temporary)
            computed = hash_file(Path(temporary), {OWN, *digests, *(["md5"] if etag else [])})
            fault = _find_difference(Path(temporary), computed, info, digests)
            # An ETag may only look like an MD5: then the file is the same twice.
            if not fault and etag not in (None, computed.get("md5")) and computed[OWN] not in seen:
                fault = "its MD5 is not the ETag"
            if not fault:
                _keep(Path(temporary), copy, computed[OWN])
                return
            seen += [computed[OWN]]
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    fix = "try again; if it fails again, ask the owner of the file"
    raise UserError(f"the download is damaged: {fault}", where=name, fix=fix)


def _find_difference(path: Path, computed: Digests, info: dict[str, Any], digests: Digests) -> str:
    """How a download differs from what the server says; empty if it does not."""
    size, received = info.get("size"), path.stat().st_size
    if size is not None and received != size:
        return f"{received:,} of {size:,} bytes"
    wrong = [name for name, digest in digests.items() if computed[name] != digest]
    return f"its {wrong[0]} is not that of the server" if wrong else ""


def _keep(temporary: Path, copy: Path, digest: str) -> None:
    """Move a download to its final name, after writing it to disk, and record its hash."""
    if _is_whole(copy) and read_json(_record(copy))[OWN] == digest:
        return  # other processes may be reading it
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    _record(copy).unlink(missing_ok=True)
    os.replace(temporary, copy)
    fsync_folder(copy.parent)
    size = copy.stat().st_size
    if size >= CACHE_FROM_BYTES:
        remember_hash(copy, digest, file_state(copy), written_here=True)
    write_json(_record(copy), {OWN: digest, "bytes": size})


def _http_options(address: str) -> dict[str, Any]:
    """Options of web addresses, also inside of others (`zip://a.jsonl::https://host/b.zip`)."""
    protocols = {"http", "https"} & {url.partition("://")[0] for url in address.split("::")}
    return {name: {"get_client": _http_client} for name in protocols}


async def _http_client(**options: Any) -> Any:
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    return aiohttp.ClientSession(trace_configs=[trace], **options)


async def _check_redirect(_: Any, __: Any, redirect: Any) -> None:
    """Refuse a redirect to another server: this machine may reach what its owner cannot.

    Raises:
        UserError: `REDIRECT_HOSTS` does not name the server.
    """
    origin, response = redirect.url, redirect.response
    target = origin.join(type(origin)(response.headers.get("Location", "")))
    same_host = target.host == origin.host
    upgraded = (origin.scheme, origin.port, target.scheme, target.port) == (
        "http", 80, "https", 443,
    )  # fmt: skip
    same = same_host and (target.origin() == origin.origin() or upgraded)
    if not same and target.host not in os.environ.get(REDIRECT_HOSTS, "").split():
        server = f"{target.scheme}://{target.authority.rpartition('@')[2]}"
        raise UserError(
            f"the server redirects to another one: {server}",
            where=without_secret(str(origin)),
            fix=f"name the final address, or allow the server: {REDIRECT_HOSTS}={target.host}",
        )


def _root(error: BaseException) -> BaseException:
    """The original error: fsspec reports a missing file even if there is no server."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return error if cause is None else _root(cause)


def _is_missing(error: Exception, root: BaseException) -> bool:
    """Whether the store answered that the file does not exist."""
    no_answer = isinstance(root, OSError) and not isinstance(root, FileNotFoundError)
    return isinstance(error, FileNotFoundError) and not no_answer


def _unreadable(address: str, error: BaseException) -> UserError:
    reason = first_line(error)
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
    """Digests that are certainly of the whole content.

    Args:
        store: file system of fsspec.
        path: of the file in it.
        info: of `store.info`.
    """
    facts = [(str(key).lower(), value) for key, value in info.items()]
    if "http" in store.protocol:
        facts += _headers(store, path)
    return {name: digest for key, value in facts for name, digest in _digests(key, value)}


def etag_md5(info: dict[str, Any]) -> str | None:
    """The ETag, if it looks like an MD5.

    On S3 it is the MD5 of objects that were uploaded in one request and are not encrypted with a
    customer's key; other servers may use other values of the same form.
    """
    match = re.fullmatch(r'"?([0-9a-fA-F]{32})"?', str(info.get("ETag") or info.get("etag") or ""))
    return match[1].lower() if match else None


def hash_file(path: Path, algorithms: set[str]) -> Digests:
    """Several hashes of a file in one pass."""
    hashes = {
        name: blake3() if name == OWN else hashlib.new(name, usedforsecurity=False)
        for name in algorithms
    }
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            for digest in hashes.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def _headers(store: Any, path: str) -> list[tuple[str, Any]]:
    """All headers of the file (fsspec keeps only some); none if the server rejects HEAD."""

    async def ask() -> list[tuple[str, Any]]:
        session = await store.set_session()
        whole = {"Accept-Encoding": "identity"}
        async with session.head(store.encode_url(path), allow_redirects=True, headers=whole) as got:
            plain = got.headers.get("Content-Encoding", "identity") == "identity"
            known = got.headers.items() if got.status == 200 and plain else ()
            return [(key.lower(), value) for key, value in known]

    headers: list[tuple[str, Any]] = asyn.sync(store.loop, ask)
    return headers


def _digests(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Algorithm and hex digest of each digest in a header or in a store's info."""
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
    """The digest in hex; nothing if the algorithm is unknown or the length is wrong."""
    algorithm = ALGORITHMS.get(name.lower().replace("-", ""))
    try:
        content = bytes(value) if isinstance(value, bytes | bytearray) else b64decode(str(value))
    except (binascii.Error, ValueError):
        return
    if algorithm and len(content) == hashlib.new(algorithm, usedforsecurity=False).digest_size:
        yield algorithm, content.hex()
