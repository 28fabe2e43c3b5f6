"""The tensors of a model with one row for each token, and how they get rows for new tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dtrain.core.errors import UserError
from dtrain.core.weight_files import read_header
from dtrain.models.meta_model import build_meta_model
from dtrain.models.state_dict_names import match_state_dict
from dtrain.models.stored_tensors import (
    FLOAT_DTYPES,
    DecodedTensor,
    ModelTensors,
    StoredTensor,
    row_blocks,
    stored_tensors,
)

WIDER = 64  # rows, to see which tensors have one for each token
ROWS_KEY = "vocab_size"  # and what begins so: Gemma counts the rows of each of its embeddings
BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class NewRows:
    """The rows of new tokens.

    Attributes:
        rows: of each tensor afterwards.
        starts: new token → tokens whose mean it starts from; None for all of `known`.
        known: the tokens that the model has been trained with.
    """

    rows: int
    starts: Mapping[int, list[int] | None]
    known: list[int]


def vocabulary_tensors(folder: Path, config: PretrainedConfig, trust_remote_code: bool) -> set[str]:
    """Names, in a model's files, of the tensors with one row for each token.

    The model itself says so: they are larger in one of a larger vocabulary.

    Raises:
        UserError: it has others than plain floats with a row for each token.
    """
    wider, rows = deepcopy(config), config.get_text_config(decoder=True).vocab_size
    text = wider.get_text_config(decoder=True)
    set_rows(vars(text), rows, rows + WIDER)
    text.vocab_size = rows + WIDER  # which some configs keep under another name
    model = build_meta_model(config, trust_remote_code)
    entries = model.state_dict(keep_vars=True)
    larger = build_meta_model(wider, trust_remote_code).state_dict(keep_vars=True)
    tensors = ModelTensors(folder)
    stored = match_state_dict(model, tensors).stored
    names = {id(entries[entry]): name for entry, name in stored.items()}
    found = set[str]()
    for entry, tensor in entries.items():
        shape = list(tensor.shape)
        if shape == list(larger[entry].shape):
            continue
        name = stored.get(entry) or names.get(id(tensor))
        if name is None or shape[0] != rows or not _is_plain(tensors[name], shape):
            raise UserError(f"{entry} cannot get rows for new tokens", where=str(folder))
        found.add(name)
    return found


def set_rows(settings: dict[str, Any], old: int, new: int) -> bool:
    """Give a group of a config another number of tokens, wherever it has the old one."""
    keys = [key for key, value in settings.items() if key.startswith(ROWS_KEY) and value == old]
    settings.update(dict.fromkeys(keys, new))
    return bool(keys)


def _is_plain(tensor: StoredTensor | DecodedTensor, shape: list[int]) -> bool:
    is_float = isinstance(tensor, StoredTensor) and tensor.dtype in FLOAT_DTYPES
    return is_float and list(tensor.shape) == shape


def write_with_rows(source: Path, target: Path, names: Iterable[str], new: NewRows) -> int:
    """Copy a safetensors file, with rows for new tokens in some of its tensors.

    Args:
        names: of these tensors.

    Returns:
        The number of bytes that were added to the tensors.
    """
    entries, head = read_header(source)
    metadata = json.loads(head[8:]).get("__metadata__")
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = added = 0
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        rows = max(new.rows, entry["shape"][0]) if name in names else 0
        more = (stop - start) // entry["shape"][0] * (rows - entry["shape"][0]) if rows else 0
        shape = [rows, *entry["shape"][1:]] if rows else entry["shape"]
        offsets = [at, at + stop - start + more]
        header[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": offsets}
        at, added = offsets[1], added + more
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    tensors = stored_tensors(source)
    with open(source, "rb") as old, open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        old.seek(len(head))
        for name in entries:
            at = out.tell()
            _copy(old, out, tensors[name].nbytes)
            if name in names:
                _write_rows(out, at, tensors[name], new)
    return added


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    for start in range(0, size, BLOCK_BYTES):
        target.write(source.read(min(BLOCK_BYTES, size - start)))


def _write_rows(out: IO[bytes], at: int, old: StoredTensor, new: NewRows) -> None:
    """Write the rows of the new tokens into a tensor that begins at `at`, and those after its end.

    Args:
        out: positioned after the tensor's old rows.
    """
    count, dtype = old.shape[0], FLOAT_DTYPES[old.dtype]
    mean = _mean(old, [token for token in new.known if token < count]).to(dtype)
    for _ in range(count, new.rows):
        out.write(_raw(mean))
    end, width = out.tell(), len(_raw(mean))
    for token, words in new.starts.items():
        out.seek(at + token * width)
        out.write(_raw(mean if words is None else _mean(old, words).to(dtype)))
    out.seek(end)


def _mean(old: StoredTensor, tokens: list[int]) -> Tensor:
    """The mean of rows, float64, one block of the tensor at a time."""
    wanted = torch.tensor(tokens)  # words may contain a token twice
    total = torch.zeros(old.shape[1:], dtype=torch.float64)
    for start, stop in row_blocks(old.shape):
        inside = wanted[(wanted >= start) & (wanted < stop)] - start
        if len(inside):
            total += old.rows(start, stop)[inside].double().sum(0)
    return total / len(tokens)


def _raw(row: Tensor) -> bytes:
    return row.reshape(-1).view(torch.uint8).numpy().tobytes()
