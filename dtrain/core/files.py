"""Read and write files: a write appears complete or not at all."""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint
from dtrain.core.ownership import share_with_group

SEAL, OLD_SEAL = "blake3", "sha256"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 little-endian starts as the first


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make a file's content survive a power loss."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: write a temporary file in its folder, fsync it, rename it."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_folder(path.parent)


def remove_entry(path: Path) -> None:
    """Remove a file, a link or a whole folder; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON; NaN and infinity are refused."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark at its head.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return decode_text(data, str(path))


def open_text(path: Path) -> IO[str]:
    """Open a UTF-8 file for reading line by line, behind a byte-order mark at its head.

    Raises:
        OSError: it cannot be opened.
        UserError: it is UTF-16; other bytes that are not UTF-8 raise UnicodeDecodeError when read.
    """
    with open(path, "rb") as file:
        without_mark(file.read(4), str(path))
    return open(path, encoding="utf-8-sig")


def decode_text(data: bytes, name: str) -> str:
    """The content of a UTF-8 file as text, without a byte-order mark.

    Raises:
        UserError: it is not UTF-8, with `name` and the line.
    """
    try:
        return without_mark(data, name).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 text (byte 0x{error.object[error.start]:02x})"
        raise UserError(message, where=f"{name}:{line}", fix="save the file as UTF-8") from error


def without_mark(head: bytes, name: str) -> bytes:
    """The head of a UTF-8 file without its byte-order mark.

    Raises:
        UserError: the mark is that of UTF-16 or UTF-32.
    """
    if head.startswith(UTF_16):
        fix = "save the file as UTF-8, for example with iconv -f UTF-16 -t UTF-8 OLD > NEW"
        raise UserError("is UTF-16 text, not UTF-8", where=name, fix=fix)
    return head.removeprefix(codecs.BOM_UTF8)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error


def json_lines(text: str) -> list[dict[str, Any]]:
    r"""The objects in JSON lines; lines that are none, such as one that was cut off, are skipped.

    Only \n ends a line: `str.splitlines` would also cut at U+2028 and others inside a string.
    """
    objects = []
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            objects += [value] if isinstance(value, dict) else []
    return objects


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none if it does not exist.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return json_lines(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return []


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `json.loads(…, object_pairs_hook=unique_keys)`.

    Raises:
        ValueError: a key occurs twice; json would silently keep the last one.
    """
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key} occurs twice")
        result[key] = value
    return result


class OldFormat(UserError):
    """A file in the format of an older dtrain."""


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` by `value` as JSON that carries a hash of itself in its last field."""
    write_atomic(path, _sealed(value))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        UserError: it is missing or broken, or a single bit of it was changed.
        OldFormat: an older dtrain wrote it.
    """
    content = read_json(path)
    if isinstance(content, dict) and OLD_SEAL in content and SEAL not in content:
        fix = "start again in a new folder, or finish with the version that wrote it"
        raise OldFormat("was written by an older dtrain", where=str(path), fix=fix)
    value = {k: v for k, v in content.items() if k != SEAL} if isinstance(content, dict) else {}
    if path.read_bytes() != _sealed(value).encode():
        raise UserError("was changed after it was written", where=str(path))
    return value


def _sealed(value: dict[str, Any]) -> str:
    return json.dumps({**value, SEAL: fingerprint(value)}, indent=2, allow_nan=False) + "\n"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target` that becomes `target` on success, and vanishes if not.

    Raises:
        UserError: `target` exists already.
    """
    if target.exists():
        raise UserError("exists already", where=str(target), fix="choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync_file(Path(folder) / name)
            fsync_folder(Path(folder))
        share_with_group(temporary, target.parent)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(target.parent)


O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


def write_all(handle: int, block: memoryview) -> None:
    """Write a whole block: the kernel may accept only a part, and does when the disk fills up."""
    while len(block):
        try:
            block = block[os.write(handle, block) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(handle, fcntl.F_GETFL) & O_DIRECT:
                raise
            set_direct_io(handle, False)  # the last block is not a whole number of pages


def set_direct_io(handle: int, enabled: bool) -> None:
    """Turn direct I/O on or off, where the file system supports it.

    Memory address, length and file offset of each write must then be multiples of a page.
    """
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    with suppress(OSError):  # tmpfs has no direct I/O
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | O_DIRECT if enabled else flags & ~O_DIRECT)
