"""The floats that a model's files store as codes and scales. Needs no torch.

- MXFP4, as gpt-oss (OCP Microscaling Formats 1.0): `X_blocks` [E, out, groups, 16], two codes in a
  byte, and `X_scales` [E, out, groups], the exponents of groups of 32 values, are X [E, in, out].
- fp8, as DeepSeek-V3: codes `X` [.., rows, columns] and `X_scale_inv`, a factor for each block of
  rows and columns, or one for all; `activation_scale` next to it is for inference in fp8.

Everything that reads a base takes the values for its tensors, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import read_object
from dtrain.core.weight_files import read_headers

FORMATS = ("mxfp4", "fp8")  # values of quant_method
DTYPE = "BF16"  # of the values
BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"
GROUP_BYTES = 16  # of 32 codes
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a model's files, as the model takes it.

    Attributes:
        path: of its file, or of the file of its codes.
        dtype: safetensors' name.
        coded: how it is stored; None as it is.
    """

    path: Path
    dtype: str
    shape: list[int]
    coded: Codes | None = None


@dataclass(frozen=True)
class Codes:
    """The tensors that store another one.

    Attributes:
        codes, scales: their names.
        block: rows and columns of an fp8 tensor that share a scale; None: MXFP4.
        unread: names of what only inference in fp8 needs.
    """

    codes: str
    scales: str
    block: tuple[int, int] | None
    unread: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """Its name in quant_method."""
        return FORMATS[self.block is not None]

    @property
    def names(self) -> tuple[str, ...]:
        """All names in the files."""
        return self.codes, self.scales, *self.unread


def file_tensors(folder: Path) -> dict[str, FileTensor]:
    """The tensors of a model's files, by name; those that others store take the place of these.

    Raises:
        UserError: as `read_headers`; codes have no scales that fit, or scales no codes.
    """
    headers = read_headers(folder)
    tensors = {
        name: FileTensor(path, entry["dtype"], entry["shape"])
        for path, entries in headers.items()
        for name, entry in entries.items()
    }
    made = dict[str, FileTensor]()
    # Other formats of F8 name scales otherwise; what loads a model refuses those.
    has_pairs = any(name.endswith(SCALE_INV) for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith(BLOCKS) and (scales := name.removesuffix(BLOCKS) + SCALES) in tensors:
            made[name.removesuffix(BLOCKS)] = _mxfp4(name, scales, tensors)
        elif tensor.dtype == FP8 and (scales := name + SCALE_INV) in tensors:
            made[name] = _fp8(name, scales, tensors, folder)
        elif (other := _other_half(name, tensor.dtype, has_pairs)) and other not in tensors:
            raise UserError(
                f"{name} ({tensor.dtype} {tensor.shape}) has no {other}",
                where=str(tensor.path),
                fix="download the model again, or use the original model in 16 bits",
            )
    for tensor in made.values():
        for name in tensor.coded.names if tensor.coded else ():
            tensors.pop(name, None)  # some are for several
    return tensors | made


def coded_formats(tensors: Mapping[str, FileTensor]) -> list[str]:
    """The formats of codes in a model's files."""
    return sorted({tensor.coded.format for tensor in tensors.values() if tensor.coded})


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what describes codes."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _other_half(name: str, dtype: str, has_pairs: bool) -> str:
    """The tensor without which codes or scales have no values; empty for other tensors.

    Args:
        has_pairs: the files have scales of fp8 that are named as here.
    """
    if dtype == FP8 and has_pairs:
        return name + SCALE_INV
    if name.endswith(SCALE_INV):
        return name.removesuffix(SCALE_INV)
    if dtype == "U8" and name.endswith(BLOCKS):
        return name.removesuffix(BLOCKS) + SCALES
    if dtype == "U8" and name.endswith(SCALES):
        return name.removesuffix(SCALES) + BLOCKS
    return ""


def _mxfp4(codes: str, scales: str, tensors: Mapping[str, FileTensor]) -> FileTensor:
    blocks, exponents = tensors[codes], tensors[scales]
    if {blocks.dtype, exponents.dtype} != {"U8"} or (
        len(blocks.shape) != 4 or blocks.shape != [*exponents.shape, GROUP_BYTES]
    ):
        raise _misfit(codes, scales, tensors)
    experts, out, groups, _ = blocks.shape
    shape = [experts, groups * 2 * GROUP_BYTES, out]
    return FileTensor(blocks.path, DTYPE, shape, Codes(codes, scales, None))


def _fp8(codes: str, scales: str, tensors: Mapping[str, FileTensor], folder: Path) -> FileTensor:
    stored, factors = tensors[codes], tensors[scales]
    shape, grid = stored.shape, factors.shape
    if not 2 <= len(shape) <= 3 or 0 in shape + grid or factors.dtype not in ("F32", "BF16"):
        raise _misfit(codes, scales, tensors)
    block = max(shape), max(shape)
    if prod(grid) > 1:
        block = _block(folder) or _expert_block(stored, factors, folder)
        blocks = [-(n // -size) for n, size in zip(shape[-2:], block, strict=True)]
        if grid != [*shape[:-2], *blocks]:
            raise _misfit(codes, scales, tensors)
    # Layers of one module share the first, parameters of experts have their own.
    activations = codes.rpartition(".")[0] + ".activation_scale", codes + "_activation_scale"
    unread = tuple(name for name in activations if name in tensors)
    return FileTensor(stored.path, DTYPE, shape, Codes(codes, scales, block, unread))


def _block(folder: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale, if config.json says it."""
    config = read_object(folder / "config.json")
    for group in (config, config.get("text_config")):
        settings = group.get("quantization_config") if isinstance(group, dict) else None
        size = settings.get("weight_block_size") if isinstance(settings, dict) else None
        if isinstance(size, list) and [type(n) for n in size] == [int, int] and min(size) > 0:
            return size[0], size[1]
    return None


def _expert_block(stored: FileTensor, factors: FileTensor, folder: Path) -> tuple[int, int]:
    """Rows and columns that share a scale in experts that have one each, or two.

    transformers stores fp8 without blocks so: [E, 1, 1], or [E, 2, 1] for two joined matrices.
    Other shapes leave open whether the last block is smaller than the rest.

    Raises:
        UserError: they are of another shape.
    """
    experts, rows, columns = stored.shape if len(stored.shape) == 3 else (0, 0, 0)
    for count in (1, 2):
        if factors.shape == [experts, count, 1] and rows % count == 0:
            return rows // count, columns
    raise UserError(
        "weights are stored in fp8 with a scale for each block, but quantization_config says no "
        "weight_block_size of two numbers",
        where=str(folder / "config.json"),
        fix="write it there as the model's makers state it, or use the original model in 16 bits",
    )


def _misfit(codes: str, scales: str, tensors: Mapping[str, FileTensor]) -> UserError:
    first, second = tensors[codes], tensors[scales]
    return UserError(
        f"{codes} ({first.dtype} {first.shape}) and {scales} ({second.dtype} {second.shape}) do "
        "not fit together",
        where=str(first.path),
        fix="download the model again, or use the original model in 16 bits",
    )
