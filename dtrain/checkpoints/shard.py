"""One rank's file: safetensors, written by streaming so that each byte is hashed as it goes out.

safetensors' own writer returns no hash, and a second pass over a large file would cost as much as
the first; its reader is used as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.checkpoints.pieces import is_finite
from dtrain.core.errors import Exit, UserError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BLOCK_BYTES = 1 << 20  # hashed and written while it is in the processor's cache
READ_ELEMENTS = 1 << 24  # at once, so that a huge parameter needs 64 MiB of host memory to restore
HEADER_ALIGNMENT = 8


def tensor_key(name: str, kind: str, start: int) -> str:
    """The key of one range's tensor inside a shard."""
    return f"{name}|{kind}|{start}"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write 1-D host tensors as a new safetensors file (mode 0600) and fsync it.

    Returns:
        The file's bytes and SHA-256.

    Raises:
        UserError: a tensor holds NaN or infinity.
        OSError: the file cannot be written.
    """
    # Wide dtypes first keeps every tensor aligned, as safetensors' own writer does.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb", buffering=0) as file:
        for block in _blocks(ordered):
            digest.update(block)
            _write_all(file.fileno(), block)
            size += len(block)
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _blocks(ordered: list[tuple[str, Tensor]]) -> Iterator[memoryview]:
    yield memoryview(_header(ordered))
    for key, tensor in ordered:
        if not is_finite(tensor):
            raise UserError(
                f"{_spoken(key)} holds NaN or infinity; nothing was saved",
                fix="go on from an earlier checkpoint with a lower train.learning_rate",
                status=Exit.NON_FINITE,
            )
        data = tensor.view(torch.uint8).numpy().data
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    """Length of the JSON as 8 bytes, the JSON, and spaces up to the alignment."""
    entries: dict[str, Any] = {}
    offset = 0
    for key, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        entries[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": [tensor.numel()],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_all(handle: int, block: memoryview) -> None:
    """Write a block whole: the kernel may take less at a time, and does when the disk fills up."""
    while len(block):
        block = block[os.write(handle, block) :]


def _spoken(key: str) -> str:
    name, kind, start = key.rsplit("|", 2)
    return f"{name} ({kind}, from element {start})"


class ShardReader:
    """Opens a checkpoint's shards when they are first asked for, and reads ranges out of them.

    To be closed: a shard that stays mapped keeps its room on the disk after it was removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}

    def parts(self, file: str, key: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Float32 elements [start, stop) of a tensor in bounded parts: (its start, part [n]).

        A part may be a view of the mapped file: copy it.

        Raises:
            UserError: the file has no such tensor.
        """
        view = self._slice(file, key)
        if view.get_dtype() != "F32" or view.get_shape()[0] < stop:
            raise self._unfit(file, key, f"{view.get_dtype()} {view.get_shape()}, {stop} needed")
        for begin in range(start, stop, READ_ELEMENTS):
            yield begin, view[begin : min(begin + READ_ELEMENTS, stop)]

    def whole(self, file: str, key: str) -> Tensor:
        """A tensor as it was saved, copied out of the file."""
        view: Tensor = self._slice(file, key)[:]
        return view.clone()

    def close(self) -> None:
        """Let go of the files; they are opened again when they are asked for."""
        self._open.clear()

    def _slice(self, file: str, key: str) -> Any:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self._folder / file, framework="pt", device="cpu")
            view = self._open[file].get_slice(key)
        except (OSError, SafetensorError) as error:
            raise self._unfit(file, key, str(error)) from error
        if len(view.get_shape()) != 1:
            raise self._unfit(file, key, f"shape {view.get_shape()}")
        return view

    def _unfit(self, file: str, key: str, why: str) -> UserError:
        return UserError(f"{key} cannot be read: {why}", where=str(self._folder / file))
