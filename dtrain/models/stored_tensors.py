"""Reads the tensors of a model's files, a block of rows at a time or whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dtrain.core.coded_tensors import DTYPE, coded_formats, file_tensors
from dtrain.core.lazy_import import LazyModule
from dtrain.core.weight_files import FLOATS, read_header, weight_files

mxfp4: Any = LazyModule("transformers.integrations.mxfp4")  # few models need it

BLOCK_ELEMENTS = 1 << 19
ROWS = 64  # blocks are multiples of it: see merge/weight_delta.py and merge/nf4.py
FLOAT_DTYPES: dict[str, torch.dtype] = {key: getattr(torch, name) for key, name in FLOATS.items()}
CODE_DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.stop - self.start

    def raw(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[bytearray]:
        """Yield its bytes from `start` to `stop`, `size` at a time."""
        end = self.stop if stop is None else self.start + stop
        with open(self.path, "rb") as file:
            file.seek(self.start + start)
            for at in range(self.start + start, end, size):
                yield bytearray(file.read(min(size, end - at)))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return a block of its rows."""
        dtype, inner = (FLOAT_DTYPES | CODE_DTYPES)[self.dtype], self.shape[1:]
        width = prod(inner) * dtype.itemsize
        (data,) = self.raw((stop - start) * width, start * width, stop * width)
        return torch.frombuffer(data, dtype=dtype).reshape(stop - start, *inner)


@dataclass(frozen=True)
class DecodedTensor:
    """The values of a tensor that is stored as codes and scales, rounded to bfloat16.

    Attributes:
        shape: of the values.
        block: as in `dtrain.core.coded_tensors.Codes`.
    """

    codes: StoredTensor
    scales: StoredTensor
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    dtype: str = DTYPE

    @property
    def path(self) -> Path:
        """The file of the codes."""
        return self.codes.path

    @property
    def nbytes(self) -> int:
        """Size of its values."""
        return prod(self.shape) * FLOAT_DTYPES[self.dtype].itemsize

    def raw(self, size: int) -> Iterator[bytearray]:
        """Yield the bytes of its values, in blocks of rows whatever the size."""
        for start, stop in row_blocks(self.shape):
            yield bytearray(self.rows(start, stop).view(torch.uint8).numpy())

    def rows(self, start: int, stop: int, device: torch.device = CPU) -> Tensor:
        """Return a block of the rows of its values; of experts, some of them."""
        codes = self.codes.rows(start, stop).to(device)
        if self.block is None:
            scales = self.scales.rows(start, stop).to(device)
            values: Tensor = mxfp4.convert_moe_packed_tensors(codes, scales)
            return values
        factors = self._factors(start, stop).to(device)
        return (codes.float() * factors).to(FLOAT_DTYPES[self.dtype])

    def _factors(self, start: int, stop: int) -> Tensor:
        """The scales of these rows: one for each code, or one for all."""
        if prod(self.scales.shape) == 1:
            return self.scales.rows(0, 1).float()
        assert self.block is not None
        height, width = self.block
        columns = torch.arange(self.shape[-1]) // width
        if len(self.shape) == 3:
            scales, rows = self.scales.rows(start, stop), torch.arange(self.shape[1]) // height
        else:
            first = start // height
            scales = self.scales.rows(first, (stop - 1) // height + 1)
            rows = torch.arange(start, stop) // height - first
        return scales.float()[..., rows, :][..., columns]


class ModelTensors(dict[str, StoredTensor | DecodedTensor]):
    """The tensors of a model's folder, as the model takes them.

    Raises:
        UserError: as `file_tensors`.

    Attributes:
        decoded: those that are stored as codes.
        codes: the tensors that store them.
        formats: of these codes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.decoded, self.codes = dict[str, DecodedTensor](), dict[str, StoredTensor]()
        stored = {n: t for path in weight_files(folder) for n, t in stored_tensors(path).items()}
        tensors = file_tensors(folder)
        self.formats = coded_formats(tensors)
        for name, tensor in tensors.items():
            if (how := tensor.coded) is None:
                self[name] = stored[name]
            else:
                codes, scales = stored[how.codes], stored[how.scales]
                made = DecodedTensor(codes, scales, tuple(tensor.shape), how.block)
                self[name] = self.decoded[name] = made
                self.codes |= {x: stored[x] for x in how.names}

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """Read a whole tensor; codes are decoded on the device."""
        tensor = self[name]
        if isinstance(tensor, StoredTensor):
            with safe_open(tensor.path, framework="pt") as file:
                values: Tensor = file.get_tensor(name)
            return values.to(device)
        blocks = (tensor.rows(*rows, device) for rows in row_blocks(tensor.shape))
        whole = torch.empty(tensor.shape, dtype=FLOAT_DTYPES[tensor.dtype], device=device)
        for block, (start, stop) in zip(blocks, row_blocks(tensor.shape), strict=True):
            whole[start:stop] = block
        return whole


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, as they are stored."""
    entries, head = read_header(path)
    tensors = {}
    for name, entry in entries.items():
        start, stop = (len(head) + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start, stop)
    return tensors


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first row, row after the last) of blocks of about BLOCK_ELEMENTS.

    All blocks of a matrix are multiples of 64 rows except the last, which has at least 64 unless
    the matrix has fewer. Of experts [E, rows, columns] a block is a number of experts. Without
    elements there are no blocks.
    """
    total, width = shape[0], prod(shape[1:])
    if not width:
        return
    unit = ROWS if len(shape) < 3 else 1
    size = max(BLOCK_ELEMENTS // width // unit, 1) * unit
    start = 0
    while start < total:
        stop = total if total - start < size + unit else start + size
        yield start, stop
        start = stop
