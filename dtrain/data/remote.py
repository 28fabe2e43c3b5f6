"""Files at an address such as s3://bucket/rows/*.jsonl or https://host/rows.jsonl, by fsspec.

They are copied into the cache once, so that every reader, process and later run finds plain files.
A copy is compared with the length and the digests that the server gave, and with its own hash
before each use.
Credentials come from where the store's own client looks for them, never from the address.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import FolderLock, fsync_folder, read_json, write_json
from dtrain.core.hashes import fingerprint
from dtrain.core.imports import Late
from dtrain.core.known_hashes import (
    REMEMBER_FROM_BYTES,
    FileIdentity,
    remember_sha256,
    state_of,
)
from dtrain.core.log import progress, say
from dtrain.data.digests import Digests, digests_of, etag_md5, hash_file

fsspec: Any = Late("fsspec")

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
            copy.stat().st_size == record["bytes"]
            and FileIdentity.of(copy).sha256 == record["sha256"]
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
            found = hash_file(Path(temporary), {"sha256", *digests, *(["md5"] if etag else [])})
            fault = _difference(Path(temporary), found, info, digests)
            # An ETag may look like an MD5 and be none: that of what comes twice the same.
            if not fault and etag not in (None, found.get("md5")) and found["sha256"] not in seen:
                fault = "its MD5 is not the ETag"
            if not fault:
                _keep(Path(temporary), copy, found["sha256"])
                return
            seen += [found["sha256"]]
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
    if _is_whole(copy) and read_json(_record(copy))["sha256"] == digest:
        return  # others may be reading it
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    _record(copy).unlink(missing_ok=True)
    os.replace(temporary, copy)
    fsync_folder(copy.parent)
    size = copy.stat().st_size
    if size >= REMEMBER_FROM_BYTES:
        remember_sha256(copy, digest, state_of(copy), ours=True)
    write_json(_record(copy), {"sha256": digest, "bytes": size})


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
