"""One rank's file: written from host memory, read by ranges; plain safetensors.

safetensors' own writer returns no hash, and a second pass over a large file would cost as much as
the first.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.files import set_direct_io, write_all
from dtrain.distributed.tensor_utils import all_finite

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
READ_ELEMENTS = 1 << 24  # at once: restoring a huge parameter needs 64 MiB of host memory
BLOCK_BYTES = 1 << 22
PAGE_BYTES = 1 << 12
HEADER_ALIGNMENT = 8


def tensor_key(name: str, kind: str, start: int) -> str:
    """Return the key of one range's tensor in a shard."""
    return f"{name}|{kind}|{start}"


class HostShard:
    """One rank's file in host memory, byte for byte as it will be on the disk.

    It is reused from save to save: a copy into existing memory takes a third of the time of one
    into new memory. A contiguous file is checked, hashed and written in few calls, so the thread
    that does this hardly slows training.

    Args:
        tensors: key → 1-D tensor on the host; moved, so the mapping is empty afterwards.
        pinned: let a GPU copy into it without waiting.
    """

    def __init__(self, tensors: dict[str, Tensor], *, pinned: bool = False) -> None:
        # Wide dtypes first keeps every tensor aligned, as safetensors' own writer does.
        order = [(-t.element_size(), str(t.dtype), key) for key, t in tensors.items()]
        keys = [key for *_, key in sorted(order)]
        header = _header([(key, tensors[key]) for key in keys])
        size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        self._bytes = _aligned(size, pinned=pinned)
        self._bytes[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}
        self._ends: dict[torch.dtype, int] = {}  # of each dtype's tensors, which are adjacent
        self._begin = end = len(header)
        for key in keys:
            tensor = tensors.pop(key)
            begin, end = end, end + tensor.nbytes
            self._views[key] = self._bytes[begin:end].view(tensor.dtype).copy_(tensor)
            self._ends[tensor.dtype] = end

    def take(self, key: str, tensor: Tensor) -> Tensor:
        """Copy a tensor to the place of its key; into new memory if it has none of this size.

        A copy from a GPU is complete after the GPU's next synchronization.
        """
        view = self._views.get(key)
        if view is None or view.shape != tensor.shape or view.dtype != tensor.dtype:
            return tensor.to("cpu", copy=True)
        return view.copy_(tensor, non_blocking=True)

    def holds_exactly(self, taken: Mapping[str, Tensor]) -> bool:
        """Return whether this file has a place for exactly the tensors that were taken."""
        views = self._views
        return len(taken) == len(views) and all(views.get(k) is t for k, t in taken.items())

    def write(self, path: Path) -> tuple[int, str]:
        """Write a new safetensors file (mode 0600) and fsync it.

        Returns:
            The file's bytes and BLAKE3 hash.

        Raises:
            UserError: a tensor holds NaN or infinity.
            OSError: the file cannot be written.
        """
        self._check_finite()
        data, digest = self._bytes.numpy().data, blake3()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb", buffering=0) as file:
            set_direct_io(file.fileno(), True)
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                digest.update(block)
                write_all(file.fileno(), block)
            os.fsync(file.fileno())
        return len(data), digest.hexdigest()

    def _check_finite(self) -> None:
        begin = self._begin
        for dtype, end in self._ends.items():
            if not all_finite(self._bytes[begin:end].view(dtype)):
                key = next(key for key, view in self._views.items() if not all_finite(view))
                raise UserError(
                    f"{_describe(key)} contains NaN or infinity; nothing was saved",
                    fix="resume from an earlier checkpoint with a lower train.learning_rate",
                    status=Exit.NON_FINITE,
                )
            begin = end


def _aligned(size: int, *, pinned: bool) -> Tensor:
    """Return memory that starts at a page, as direct I/O requires."""
    memory = torch.empty(size + PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE_BYTES
    if pinned:
        _pin(memory)
    return memory[start : start + size]


def _pin(memory: Tensor) -> None:
    """Page-lock memory for copies from a GPU, until it is freed.

    torch's own pinned memory is rounded up to a power of two, and kept when it is freed: a save of
    17 GB would take 32. If the system locks no more memory, copies wait for the GPU.
    """
    runtime = torch.cuda.cudart()
    start = memory.data_ptr()
    if int(runtime.cudaHostRegister(start, memory.nbytes, 0)) == 0:
        # `finalize` holds no reference to the storage, and acts before its memory is freed.
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, start)
        return
    with suppress(RuntimeError):  # the next kernel launch reports the error: make it this one
        torch.zeros(1, device="cuda")


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    """Return the length of the JSON as 8 bytes, the JSON, and padding up to the alignment."""
    entries: dict[str, Any] = {}
    offset = 0
    for key, tensor in ordered:
        end = offset + tensor.nbytes
        entries[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": [tensor.numel()],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _describe(key: str) -> str:
    name, kind, start = key.rsplit("|", 2)
    return f"{name} ({kind}, from element {start})"


class ShardReader:
    """Opens a checkpoint's shards on first use, and reads ranges from them.

    Close it after use: a shard that stays mapped keeps its disk space after it was removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}

    def read(self, file: str, key: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield float32 elements [start, stop) of a tensor in bounded blocks: (start, block [n]).

        A block may be a view of the mapped file: copy it.

        Raises:
            UserError: the file has no such tensor.
        """
        view = self._slice(file, key)
        if view.get_dtype() != "F32" or view.get_shape()[0] < stop:
            raise self._unreadable(
                file, key, f"{view.get_dtype()} {view.get_shape()}, {stop} needed"
            )
        for begin in range(start, stop, READ_ELEMENTS):
            yield begin, view[begin : min(begin + READ_ELEMENTS, stop)]

    def read_all(self, file: str, key: str) -> Tensor:
        """Return a tensor as it was saved, copied out of the file."""
        view: Tensor = self._slice(file, key)[:]
        return view.clone()

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self._open.clear()

    def _slice(self, file: str, key: str) -> Any:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self._folder / file, framework="pt", device="cpu")
            view = self._open[file].get_slice(key)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(file, key, str(error)) from error
        if len(view.get_shape()) != 1:
            raise self._unreadable(file, key, f"shape {view.get_shape()}")
        return view

    def _unreadable(self, file: str, key: str, why: str) -> UserError:
        return UserError(f"{key} cannot be read: {why}", where=str(self._folder / file))
