"""One rank's file on the disk: plain safetensors, read by ranges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.core.errors import UserError

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
READ_ELEMENTS = 1 << 24  # at once, so that a huge parameter needs 64 MiB of host memory to restore


def tensor_key(name: str, kind: str, start: int) -> str:
    """The key of one range's tensor inside a shard."""
    return f"{name}|{kind}|{start}"


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
