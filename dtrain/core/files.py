"""Read and write files: a write appears complete or not at all."""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint
from dtrain.core.lazy_import import LazyModule
from dtrain.core.ownership import share_with_group
from dtrain.core.units import size

file_types: Any = LazyModule("dtrain.core.file_types")  # pydantic, which few commands need

SEAL, OLD_SEAL = "blake3", "sha256"
MAX_BYTES = 1 << 25  # of a file that is read whole; parsed JSON takes up to twenty times its size
TAIL_BYTES = 20_000  # of a log whose end is read
MAX_DEPTH = 100  # of lists and objects in each other
MAX_LINES_BYTES = 1 << 28  # of JSON lines; those of a million steps
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
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
    write_atomic(path, json_text(value, allow_nan=False))


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """A JSON file's text, indented; NaN and infinity, which configs contain, as Python writes them.

    Raises:
        ValueError: without `allow_nan`, one of them is in `value`.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def json_line(value: Any) -> str:
    """A line of a file of JSON lines."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading: no pipe, which would wait for a writer, and no device.

    Raises:
        OSError: it cannot be opened.
        UserError: it is no file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError("is not a file", where=str(path))
    return open(handle, "rb")


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file of limited size.

    Raises:
        UserError: it cannot be read, is no file, or is larger.
    """
    try:
        with open_file(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:  # its name has a NUL, or half a character
        raise UserError(f"cannot be read: {error}", where=ascii(str(path))) from error
    if len(data) > limit:
        raise UserError(f"is larger than {size(limit)}", where=str(path))
    return data


def is_missing(error: UserError) -> bool:
    """Whether a file could not be read because there is none.

    A file that another process replaces and removes is read without asking first: it may be gone
    when it is opened.
    """
    return isinstance(error.__cause__, FileNotFoundError)


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, without a byte-order mark at its head.

    Raises:
        UserError: it cannot be read, is too large, or is not UTF-8.
    """
    return decode_text(read_bytes(path, limit), str(path))


def open_text(path: Path) -> IO[str]:
    """Open a UTF-8 file for reading line by line, behind a byte-order mark at its head.

    Raises:
        OSError: it cannot be opened.
        UserError: it is no file, or UTF-16; other bytes that are not UTF-8 raise
            UnicodeDecodeError when read.
    """
    with open_file(path) as file:
        strip_bom(file.read(4), str(path))
    return open(path, encoding="utf-8-sig")


def bounded_lines(file: IO[str], where: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file, numbered from 1; none fills the memory.

    Raises:
        UserError: a line is too long.
    """
    number = 1
    while line := file.readline(MAX_BYTES + 1):
        if len(line) > MAX_BYTES:
            raise UserError(f"the line is longer than {size(MAX_BYTES)}", where=f"{where}:{number}")
        yield number, line
        number += 1


def read_tail(path: Path, limit: int = TAIL_BYTES) -> str:
    """The last `limit` bytes of a file as text; empty if it cannot be read.

    Its first line may be cut off.
    """
    with suppress(OSError, UserError), open_file(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
        return file.read().decode(errors="replace")
    return ""


def decode_text(data: bytes, name: str) -> str:
    """The content of a UTF-8 file as text, without a byte-order mark.

    Raises:
        UserError: it is not UTF-8, with `name` and the line.
    """
    try:
        return strip_bom(data, name).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 text (byte 0x{error.object[error.start]:02x})"
        raise UserError(message, where=f"{name}:{line}", fix="save the file as UTF-8") from error


def strip_bom(head: bytes, name: str) -> bytes:
    """The head of a UTF-8 file without its byte-order mark.

    Raises:
        UserError: the mark is that of UTF-16 or UTF-32.
    """
    if head.startswith(UTF_16):
        fix = "save the file as UTF-8, for example with iconv -f UTF-16 -t UTF-8 OLD > NEW"
        raise UserError("is UTF-16 text, not UTF-8", where=name, fix=fix)
    return head.removeprefix(codecs.BOM_UTF8)


def read_json(path: Path, kind: Any = Any) -> Any:
    """Read a JSON file.

    Args:
        kind: the type of its content, for `check_type`.

    Raises:
        UserError: it is missing, too large, broken, nested too deeply or of another type.
    """
    return parse_json(read_text(path), str(path), kind)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        UserError: as `read_json`.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", where=str(path))
    return value


def parse_json(text: str | bytes, where: str, kind: Any = Any) -> Any:
    """Parse JSON.

    Args:
        where: its file, for messages.
        kind: the type of the content, for `check_type`.

    Raises:
        UserError: it is broken, nested too deeply or of another type.
    """
    plain = decode_text(text, where) if isinstance(text, bytes) else text
    try:
        value = json.loads(plain)
        if _SURROGATE.search(plain):  # no file name and no output can contain half a pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError("is nested too deeply", where=where) from error
    except ValueError as error:
        raise UserError(f"cannot be read: {error}", where=where) from error
    if plain.count("[") + plain.count("{") > MAX_DEPTH:
        _check_depth(value, where)
    return value if kind is Any else file_types.check_type(value, kind, where)


def _check_depth(value: Any, where: str) -> None:
    """Check that lists and objects are not nested too deeply for functions that call themselves.

    Raises:
        UserError: they are.
    """
    level, depth = [value], 0
    while level := [item for inner in level for item in _contents(inner)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError("is nested too deeply", where=where)


def _contents(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def parse_json_lines(text: str, kind: Any = Any) -> list[dict[str, Any]]:
    r"""The objects in JSON lines; lines that are none, such as one that was cut off, are skipped.

    Only \n ends a line: `str.splitlines` would also cut at U+2028 and others inside a string.

    Args:
        kind: the type of the objects, for `check_type`; others are skipped.
    """
    objects = []
    for line in text.split("\n"):
        if line:
            with suppress(UserError):
                value = parse_json(line, "", kind)
                objects += [value] if isinstance(value, dict) else []
    return objects


def read_json_lines(path: Path, kind: Any = Any) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none if it does not exist.

    Raises:
        UserError: it cannot be read, or is too large.
    """
    try:
        data = read_bytes(path, MAX_LINES_BYTES)
    except UserError as error:
        if is_missing(error):
            return []
        raise
    return parse_json_lines(data.decode(errors="replace"), kind)


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
    with suppress(ValueError):  # a number that is not finite
        if read_bytes(path) == _sealed(value).encode():
            return value
    raise UserError("was changed after it was written", where=str(path))


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
