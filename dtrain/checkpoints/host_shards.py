"""One rank's file in host memory, and its way to the disk.

safetensors' own writer returns no hash, and a second pass over a large file would cost as much as
the first.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from dtrain.checkpoints.parameter_shards import is_finite
from dtrain.checkpoints.shard_file import DTYPES
from dtrain.core.direct_io import set_direct_io, write_all
from dtrain.core.errors import Exit, UserError

BLOCK_BYTES = 1 << 22
PAGE_BYTES = 1 << 12
HEADER_ALIGNMENT = 8


class HostShard:
    """One rank's file in host memory, byte for byte as it will lie on the disk.

    It lives from save to save: a copy into memory that is there takes a third of the time of one
    into new memory, and a file in one piece is looked through, hashed and written in few calls, so
    that the thread which does that hardly disturbs the training beside it.

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
        self._ends: dict[torch.dtype, int] = {}  # of each dtype's tensors, side by side
        self._begin = end = len(header)
        for key in keys:
            tensor = tensors.pop(key)
            begin, end = end, end + tensor.nbytes
            self._views[key] = self._bytes[begin:end].view(tensor.dtype).copy_(tensor)
            self._ends[tensor.dtype] = end

    def take(self, key: str, tensor: Tensor) -> Tensor:
        """Copy a tensor to where its key lies; into memory of its own where there is no room.

        What comes from a GPU is there after its next synchronisation.
        """
        view = self._views.get(key)
        if view is None or view.shape != tensor.shape or view.dtype != tensor.dtype:
            return tensor.to("cpu", copy=True)
        return view.copy_(tensor, non_blocking=True)

    def is_made_of(self, taken: Mapping[str, Tensor]) -> bool:
        """Whether all that was taken has its place here, and nothing else has."""
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
            if not is_finite(self._bytes[begin:end].view(dtype)):
                key = next(key for key, view in self._views.items() if not is_finite(view))
                raise UserError(
                    f"{_spoken(key)} holds NaN or infinity; nothing was saved",
                    fix="go on from an earlier checkpoint with a lower train.learning_rate",
                    status=Exit.NON_FINITE,
                )
            begin = end


def _aligned(size: int, *, pinned: bool) -> Tensor:
    """Bytes that start at a page, as a write past the page cache wants them."""
    room = torch.empty(size + PAGE_BYTES, dtype=torch.uint8)
    start = -room.data_ptr() % PAGE_BYTES
    if pinned:
        _pin(room)
    return room[start : start + size]


def _pin(room: Tensor) -> None:
    """Lock memory for a GPU's copies, until it is freed.

    torch's own pinned memory is rounded up to a power of two, and kept when it is freed: a save of
    17 GB would take 32. Where the system locks no more memory, copies wait for the GPU.
    """
    runtime = torch.cuda.cudart()
    start = room.data_ptr()
    if int(runtime.cudaHostRegister(start, room.nbytes, 0)) == 0:
        # `finalize` holds no reference to the storage, and acts before its memory is freed.
        weakref.finalize(room.untyped_storage(), runtime.cudaHostUnregister, start)
        return
    with suppress(RuntimeError):  # the next launch reports the error: let it be this one
        torch.zeros(1, device="cuda")


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    """Length of the JSON as 8 bytes, the JSON, and spaces up to the alignment."""
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


def _spoken(key: str) -> str:
    name, kind, start = key.rsplit("|", 2)
    return f"{name} ({kind}, from element {start})"
