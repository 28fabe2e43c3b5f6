"""Check a model's files before anything loads them: whether they are here, whole and trainable.

Needs no torch: config.json, the file names and the headers of the safetensors files say enough.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.core.cache_paths import hub_id, hub_snapshot, local_path, sample_name
from dtrain.core.coded_tensors import file_tensors
from dtrain.core.errors import UserError
from dtrain.core.files import read_text
from dtrain.core.weight_files import FLOATS, check_index, has_tokenizer
from dtrain.planning.architectures import (
    ARCHITECTURES,
    check_not_quantized,
    read_config,
    shape_of,
)
from dtrain.planning.shapes import check_stored

TOKENIZER_BYTES = 1 << 28
LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,6})\.")


@dataclass(frozen=True)
class LocalModel:
    """A model's folder on this machine.

    Attributes:
        config: content of its config.json.
        shapes: of each tensor in its files, by name.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, list[int]]


def find_model(address: str, revision: str | None = None) -> Path | None:
    """The folder of a model, if it is on this machine.

    Args:
        address: folder, hub id or sample.
        revision: of a hub id.

    Returns:
        None for a hub id that is not in the cache, and for a sample that is not built yet.

    Raises:
        UserError: the address is a path without a folder.
    """
    path = local_path(address)
    if path.is_dir():
        return path
    if hub_id(address):
        return hub_snapshot(address, revision)
    if sample_name(address) is None:
        raise UserError(f"there is no folder {path}", fix="use the folder of a model, or a hub id")
    return None


def open_model(folder: Path) -> LocalModel:
    """Check the files of a model, and read their headers.

    Raises:
        UserError: no config.json or tokenizer, a missing or incomplete file of weights, a tensor of
            the index that no file has, quantized weights, or other sizes than the config's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError("has no config.json, so it is not a model", where=str(folder))
    config = read_config(path)
    check_not_quantized(config, str(path))
    if not has_tokenizer(folder):
        fix = "put the tokenizer's files into the model's folder"
        raise UserError("no tokenizer in it, such as tokenizer.json", where=str(folder), fix=fix)
    shapes: dict[str, list[int]] = {}
    names = set[str]()  # in the files
    for name, tensor in file_tensors(folder).items():
        is_code = tensor.dtype.startswith("F") or name.endswith("weight")  # masks may be bool
        if tensor.dtype not in FLOATS and is_code:
            raise stored_quantized_error(name, tensor.dtype, tensor.path)
        shapes[name] = tensor.shape
        names.update(tensor.coded.names if tensor.coded else (name,))
    check_index(folder, names)
    _check_shape(config, shapes, str(path))
    return LocalModel(folder, config, shapes)


def _check_shape(config: dict[str, Any], shapes: dict[str, list[int]], where: str) -> None:
    """Check the sizes of a decoder, alone or in a multimodal model, if the plan knows its type."""
    is_alone = config.get("model_type") in ARCHITECTURES
    decoder = config if is_alone else config.get("text_config")
    try:
        shape = shape_of(decoder or {}, where)
    except UserError:  # another type, or a size that transformers knows
        return
    check_stored(shape, shapes.values(), where)
    numbers = {int(match[1]) for name in shapes if (match := LAYER.match(name))}
    more = len(numbers) > shape.layers and not config.get("num_nextn_predict_layers")
    if is_alone and more:  # GLM's files have layers that no text needs
        raise UserError(
            f"num_hidden_layers is {shape.layers}, but the files have {len(numbers)} layers",
            where=where,
            fix="weights and config.json must belong to the same model; download them again",
        )


def known_tokens(folder: Path) -> dict[str, int]:
    """The tokens of a model's tokenizer.json and their numbers; empty if it has no such file.

    Raises:
        UserError: the file is broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path, TOKENIZER_BYTES))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # of pieces with their scores
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        vocabulary = dict(vocabulary)
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError("is not a tokenizer's file", where=str(path)) from error
    return vocabulary | added


def check_new(tokens: Iterable[str], known: Mapping[str, int]) -> None:
    """Check that a base has none of the recipe's new tokens.

    Raises:
        UserError: it has one.
    """
    if old := next((token for token in tokens if token in known), None):
        raise UserError(
            f"the base has the token {old!r} already, number {known[old]}",
            where="model.tokens.add",
            fix="leave it out",
        )


def stored_quantized_error(name: str, dtype: str, where: Path) -> UserError:
    """The error of a tensor that is stored as codes; a cast would take them for values."""
    return UserError(
        f"{name} is stored as {dtype}, so this base is quantized",
        where=str(where),
        fix="use the original model in 16 bits; method.kind: qlora quantizes it",
    )
