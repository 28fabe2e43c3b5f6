"""A safetensors file rewritten tensor by tensor.

Names, shapes and dtypes stay, so the header stays, to the byte: what is not changed is copied
as bytes, whatever its dtype, and what is changed is one tensor in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.hashes import BLOCK_BYTES
from dtrain.core.log import Meter
from dtrain.merge.adapter import FLOATS
from dtrain.models.finite import all_finite
from dtrain.models.weights import read_header

Change = Callable[[Tensor], Tensor]  # a tensor as stored → its new value, same shape, any float


class Hashed:
    """A file whose bytes are hashed as they pass."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int) -> bytearray:
        """Exactly `size` bytes."""
        block = bytearray(size)
        read = self._file.readinto(block)  # type: ignore[attr-defined]
        if read != size:
            raise EOFError
        self._digest.update(block)
        return block

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of `data`."""
        self._digest.update(data)
        self._file.write(data)

    def sha256(self) -> str:
        """Of all that passed, as hex."""
        return self._digest.hexdigest()


def rewrite_file(
    source: Path, target: Path, changes: Mapping[str, Change], bar: Meter
) -> tuple[str, str]:
    """Write `source` to `target` with some tensors changed, each rounded once to its own dtype.

    Args:
        bar: advanced by one a tensor.

    Returns:
        SHA-256 of the source and of the target.

    Raises:
        UserError: a new value that is not finite, a source that shrinks while it is read.
    """
    entries, head = read_header(source)
    try:
        with open(source, "rb") as old, open(target, "xb") as new:
            reader, writer = Hashed(old), Hashed(new)
            writer.write(reader.read(len(head)))
            for name, entry in entries.items():
                if name in changes:
                    _change(reader, writer, name, entry, changes[name])
                else:
                    _copy(reader, writer, entry)
                bar.advance()
    except EOFError as error:
        raise UserError("changed while it was read", where=str(source)) from error
    return reader.sha256(), writer.sha256()


def _size(entry: dict[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return int(stop - start)


def _copy(reader: Hashed, writer: Hashed, entry: dict[str, Any]) -> None:
    left = _size(entry)
    while left:
        block = reader.read(min(left, BLOCK_BYTES))
        writer.write(block)
        left -= len(block)


def _change(
    reader: Hashed, writer: Hashed, name: str, entry: dict[str, Any], change: Change
) -> None:
    dtype = FLOATS[entry["dtype"]]
    stored = torch.frombuffer(reader.read(_size(entry)), dtype=dtype).reshape(entry["shape"])
    value = change(stored).to(dtype).contiguous()
    assert value.shape == stored.shape, name
    if not all_finite(value):
        raise UserError(
            f"{name} is not finite in {entry['dtype']}", where="merge", status=Exit.NON_FINITE
        )
    writer.write(value.view(-1).view(torch.uint8).numpy().data)
