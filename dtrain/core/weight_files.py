"""The files of a model's folder, and the tensors in them. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from dtrain.core.cache_paths import hub_cache, hub_id, hub_snapshot
from dtrain.core.errors import UserError
from dtrain.core.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
)
HEADER_LIMIT_BYTES = 100_000_000  # of the safetensors format


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model, sorted by name, as transformers chooses them.

    Raises:
        UserError: the folder does not exist or has no such file, a shard is missing, or the index
            points outside the folder.
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
        raise UserError(f"shard {missing[0]} is missing", where=str(index), fix="download it again")
    return [folder / name for name in sorted(names)]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a file of a tokenizer."""
    return any(match for pattern in TOKENIZER_FILES for match in folder.glob(pattern))


def undownloaded(address: str, revision: str | None = None) -> str:
    """What is missing of a hub id in the cache of the hub's client; empty if nothing is.

    Args:
        address: a model; empty for folders and samples.
        revision: branch, tag or commit.
    """
    if not hub_id(address):
        return ""
    folder = hub_snapshot(address, revision)
    if folder is None or not (folder / "config.json").is_file() or not has_tokenizer(folder):
        return f"{address} was not downloaded to this machine ({hub_cache()})"
    try:
        weight_files(folder)
    except UserError as error:
        return f"{address} was not downloaded whole: {error.where}: {error.message}"
    return ""


def _weight_map(index: Path) -> dict[str, Any]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("no weight_map in it", where=str(index))
    return weight_map


def _inside(index: Path, name: object) -> str:
    """Check that a name stays in the folder: transformers itself would follow `../elsewhere`."""
    if not isinstance(name, str) or name in ("", ".", "..") or PurePosixPath(name).name != name:
        raise UserError(f"points outside its folder: {name!r}", where=str(index))
    return name


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Read the header of a safetensors file.

    Returns:
        The entry of each tensor (dtype, shape, data_offsets), in the order of their bytes, and the
        file's first bytes up to the tensors.

    Raises:
        UserError: it is not a complete safetensors file.
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
        raise ValueError(f"{size} bytes of tensors, but {position} in the header")


def check_complete(
    folder: Path, missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str] = ()
) -> None:
    """Check that the files match the model's tensors; transformers would fill in random ones.

    Raises:
        UserError: they do not; the error names the first tensors.
    """
    for names, problem in (
        (missing, "are missing"),
        (reshaped, "are of another shape"),
        (unexpected, "are in the files but not in the model"),
    ):
        if names := sorted(names):
            raise UserError(
                f"{len(names)} tensors {problem}: {', '.join(names[:3])}",
                where=str(folder),
                fix="weights and config.json must belong to the same model; download them again",
            )
