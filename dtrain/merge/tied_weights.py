"""A base's tensors, and which two of them are one matrix: the embedding and the output head.

The model itself is asked, built without memory. A merge that changes the two differently writes
both, and `tie_word_embeddings: false`, so that every loader computes with both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.files import read_json
from dtrain.core.lazy_import import LazyModule
from dtrain.models.weight_files import read_header, weight_files

# A second to import, and few merges need them.
models: Any = LazyModule("dtrain.models.outline")
model_names: Any = LazyModule("dtrain.models.weight_files")
transformers: Any = LazyModule("transformers")
COMPARED_BYTES = 1 << 22  # at once
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class TiedPair:
    """The embedding and the head that is the same matrix, by their names in the base's files.

    Attributes:
        missing: the one of them that has no tensor of its own; None if both are stored.
    """

    embedding: str
    head: str
    missing: str | None

    @property
    def stored(self) -> str:
        """The one that is read from the base; of two, the embedding."""
        return self.head if self.missing == self.embedding else self.embedding

    @property
    def names(self) -> tuple[str, str]:
        """Embedding and head."""
        return self.embedding, self.head


class Shapes(dict[str, tuple[str, list[int]]]):
    """The dtype and shape of every tensor of a base folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        for path in weight_files(folder):
            self |= {n: (e["dtype"], e["shape"]) for n, e in read_header(path)[0].items()}

    @cached_property
    def tied(self) -> TiedPair | None:
        """Embedding and head, if they are one matrix; builds the model, so it costs a second.

        Raises:
            UserError: the config ties them, and this transformers cannot build the model.
        """
        module_names = _tied_parameters(self._model)
        if module_names is None:
            return None
        embedding, head = (self.stored_name(name) for name in module_names)
        if embedding and head:  # two that differ are not tied by transformers when it loads them
            return TiedPair(embedding, head, None) if self._are_equal(embedding, head) else None
        if embedding:
            return TiedPair(embedding, module_names[1], module_names[1])
        return TiedPair(module_names[0], head, module_names[0]) if head else None

    def stored_name(self, name: str) -> str | None:
        """The files' name of a parameter: with or without the outermost module's name, or renamed.

        None if no file has it, or in another form.
        """
        plain = next((n for n in (name, name.partition(".")[2]) if n in self), None)
        return plain or self._renamed.get(name)

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Files' names by those of the model's modules; empty if the model cannot be built."""
        try:
            model = self._model
        except UserError:
            return {}
        return {} if model is None else model_names.file_names(model, self).stored

    @cached_property
    def _model(self) -> Any:
        return _outline(self.folder)

    @cached_property
    def has_turned_layers(self) -> bool:
        """Whether layers keep their matrix as [in, out], or the model cannot be built to see it."""
        try:
            model = self._model
        except UserError:
            return True
        return model is None or any(type(m).__name__ == "Conv1D" for m in model.modules())

    def shape_of(self, name: str) -> tuple[str, list[int]]:
        """Dtype and shape, of the missing one of a tied pair too."""
        is_missing = name not in self and self.tied is not None and name == self.tied.missing
        return self[self.tied.stored if is_missing and self.tied else name]

    def changes_tied(self, names: set[str]) -> TiedPair | None:
        """The tied pair, if one of these names is of it.

        Only a name outside the numbered layers can be, so that few models are built for this.
        """
        if not any(is_outside_layers(name) and self._is_matrix(name) for name in names):
            return None
        return self.tied if self.tied and not names.isdisjoint(self.tied.names) else None

    def _is_matrix(self, name: str) -> bool:
        return name not in self or len(self[name][1]) == 2

    def _are_equal(self, one: str, other: str) -> bool:
        a, b = (stored_tensor(self.folder, name) for name in (one, other))
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pairs = zip(a.raw(COMPARED_BYTES), b.raw(COMPARED_BYTES), strict=True)
        return all(x == y for x, y in pairs)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def raw(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[bytearray]:
        """Its bytes from `start` to `stop`, `size` at a time."""
        end = self.stop if stop is None else self.start + stop
        with open(self.path, "rb") as file:
            file.seek(self.start + start)
            for at in range(self.start + start, end, size):
                yield bytearray(file.read(min(size, end - at)))

    def rows(self, start: int, stop: int) -> Tensor:
        """A block of its rows; floats only."""
        dtype, inner = FLOATS[self.dtype], self.shape[1:]
        width = prod(inner) * dtype.itemsize
        (data,) = self.raw((stop - start) * width, start * width, stop * width)
        return torch.frombuffer(data, dtype=dtype).reshape(stop - start, *inner)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file."""
    entries, head = read_header(path)
    found = {}
    for name, entry in entries.items():
        start, stop = (len(head) + offset for offset in entry["data_offsets"])
        found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start, stop)
    return found


def stored_tensor(folder: Path, name: str) -> StoredTensor:
    """A tensor of a model's folder."""
    found = (stored_tensors(path).get(name) for path in weight_files(folder))
    return next(tensor for tensor in found if tensor is not None)


def is_outside_layers(name: str) -> bool:
    """Whether a tensor belongs to none of the numbered layers, as embedding and head do."""
    return not any(part.isdigit() for part in name.split("."))


def untied_config(folder: Path) -> str:
    """The content of config.json for the model with a head of its own.

    Raises:
        UserError: the architecture ties the two whatever its config says.
    """
    config = read_json(folder / "config.json")
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        if part is config or "tie_word_embeddings" in part or part is config.get("text_config"):
            part["tie_word_embeddings"] = False
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    with TemporaryDirectory() as probe:
        (Path(probe) / "config.json").write_text(text, encoding="utf-8")
        if _tied_parameters(_outline(Path(probe))) is not None:
            raise UserError(
                f"embedding and head of a {config.get('model_type')} cannot be untied, and the "
                "adapter changes them differently",
                where=str(folder),
                fix="train with `ensure_weight_tying: true`, or serve base and adapter unmerged",
            )
    return text


def _tied_parameters(model: Any) -> tuple[str, str] | None:
    """Names of the embedding and of the head that is the same parameter, as modules call them.

    Args:
        model: from `_outline`.
    """
    output = model.get_output_embeddings() if model is not None else None
    if model is None or output is None:
        return None
    weight = model.get_input_embeddings().weight
    if output.weight is not weight:
        return None
    head = next(name for name, module in model.named_modules() if module is output)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    embedding = next((name for name in names if name != f"{head}.weight"), None)
    return (embedding, f"{head}.weight") if embedding else None


def _outline(folder: Path) -> Any:
    """The model without storage; None if there is none to build and nothing is tied."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return models.outline(config)
    except Exception as error:  # code of its own, an architecture or a setting that is not known
        raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if not raw.get("tie_word_embeddings"):
            return None
        raise UserError(
            "embedding and head are tied, and which tensors they are is not known: "
            f"{models.first_line(error)}",
            where=str(folder / "config.json"),
            fix="untie the base first, or leave embedding and head out of the adapter",
        ) from error
