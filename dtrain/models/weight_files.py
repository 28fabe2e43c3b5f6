"""Which safetensors file holds which tensor of a model folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dtrain.core.errors import UserError
from dtrain.core.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT_BYTES = 100_000_000  # of the safetensors format


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, sorted by name; the same choice as transformers makes.

    Raises:
        UserError: no folder, none in it, one is missing, or the index points outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder))
    if not index.is_file():
        raise UserError(
            f"no safetensors weights ({SINGLE} or {INDEX})",
            where=str(folder),
            fix="save the model with save_pretrained(…); pickled weights are not read",
        )
    names = {_inside(index, name) for name in _weight_map(index).values()}
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        raise UserError(f"shard {missing[0]} is missing", where=str(index), fix="fetch it again")
    return [folder / name for name in sorted(names)]


def _weight_map(index: Path) -> dict[str, Any]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("no weight_map in it", where=str(index))
    return weight_map


def _inside(index: Path, name: object) -> str:
    """Refuse what leaves the folder: transformers itself would follow `../elsewhere`."""
    if not isinstance(name, str) or name in ("", ".", "..") or PurePosixPath(name).name != name:
        raise UserError(f"points outside its folder: {name!r}", where=str(index))
    return name


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    """The header of a safetensors file.

    Returns:
        What stands about each tensor (dtype, shape, data_offsets), in the order of their bytes,
        and the file's first bytes up to the tensors, verbatim.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT_BYTES:
            raise UserError("not a safetensors file", where=str(path))
        head = file.read(length)
    try:
        entries = json.loads(head)
        entries.pop("__metadata__", None)
        ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        _check_layout(ordered, path.stat().st_size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("not a whole safetensors file", where=str(path)) from error
    return dict(ordered), length.to_bytes(8, "little") + head


def _check_layout(entries: list[tuple[str, dict[str, Any]]], size: int) -> None:
    position = 0
    for name, entry in entries:
        start, stop = entry["data_offsets"]
        if start != position or stop < start:
            raise ValueError(f"a gap before {name}")
        position = stop
    if position != size:
        raise ValueError(f"{size} bytes of tensors, {position} announced")


@dataclass(frozen=True)
class FileNames:
    """Which tensor of the files each entry of a model's state dict is.

    Attributes:
        stored: name in the model → name in the files, where the tensor is the same.
        converted: names in the files of tensors that are split, joined or turned when loaded.
        missing: entries of the model that no file has, without tied and ignorable ones.
        unexpected: names in the files that the model has no entry for, without ignorable ones.
    """

    stored: dict[str, str]
    converted: list[str]
    missing: list[str]
    unexpected: list[str]


def file_names(model: PreTrainedModel, names: Iterable[str]) -> FileNames:
    """Match a model's state dict with the names in its files, as `from_pretrained` does.

    Args:
        model: with or without storage.
        names: of the tensors in the files.
    """
    entries: dict[str, Tensor] = model.state_dict(keep_vars=True)
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    prefix = model.base_model_prefix
    stored, converted, unexpected = {}, [], set()
    for name in names:
        own, pattern = rename_source_key(name, renamings, converters, prefix, entries)
        if own not in entries and name in entries:
            own, pattern = rename_source_key(name, [], [], prefix, entries)
        if own not in entries:
            unexpected.add(own)
        elif pattern is not None:
            converted.append(name)
        else:
            stored[own] = name
    filled = {id(entries[own]) for own in stored}  # a tied parameter is one
    missing = {own for own, tensor in entries.items() if id(tensor) not in filled}
    # what transformers itself passes over without a word
    report = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(report)  # type: ignore[arg-type] # reads these two
    return FileNames(stored, converted, sorted(report.missing_keys), sorted(report.unexpected_keys))


def check_complete(
    folder: Path, missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str] = ()
) -> None:
    """Refuse weights that are not those of the model: transformers would fill in random numbers.

    Raises:
        UserError: naming the first ones.
    """
    for found, what in (
        (missing, "are missing"),
        (reshaped, "are of another shape"),
        (unexpected, "are in the files but not in the model"),
    ):
        if names := sorted(found):
            raise UserError(
                f"{len(names)} tensors {what}: {', '.join(names[:3])}",
                where=str(folder),
                fix="weights and config.json must be of one model; fetch them again",
            )
