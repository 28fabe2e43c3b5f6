"""An adapter in PEFT layout, checked against the base it is to be merged into."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.files import read_json
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.merge.adapter_config import check_config
from dtrain.merge.stream import row_blocks
from dtrain.merge.tied_weights import FLOATS, Shapes, is_outside_layers
from dtrain.merge.weight_delta import CONVOLUTIONS, Layer, Step
from dtrain.models.peft_format import file_keys
from dtrain.models.tensor_utils import all_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"
ROLES = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "m",
    ".lora_embedding_A": "a", ".lora_embedding_B": "b",
    ".lora_A": "a", ".lora_B": "b", ".lora_E": "e",
    ".lora_B.bias": "bias",
}  # fmt: skip


class Tensors(Protocol):
    """Where an adapter's tensors lie."""

    shapes: dict[str, list[int]]

    def get(self, key: str) -> Tensor:
        """A tensor in float32."""

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, as they are stored."""

    def mark(self) -> str:
        """Hash of the content."""


class AdapterFile:
    """The tensors of an adapter folder, by their keys without the adapter's name.

    Raises:
        UserError: there is no whole safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / WEIGHTS
        with self._open() as file:
            self._keys = file_keys(file.keys(), self._path)
            self.shapes: dict[str, list[int]] = {
                name: file.get_slice(key).get_shape() for name, key in self._keys.items()
            }

    def get(self, key: str) -> Tensor:
        """A tensor in float32."""
        with self._open() as file:
            tensor: Tensor = file.get_tensor(self._keys[key])
        return tensor.float()

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, as they are stored."""
        with self._open() as file:
            tensor: Tensor = file.get_slice(self._keys[key])[start:stop]
        return tensor

    def mark(self) -> str:
        """Hash of the folder's two files."""
        return fingerprint({n: file_hash(self._path.with_name(n)) for n in (CONFIG, WEIGHTS)})

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt")
        except FileNotFoundError as error:
            raise UserError(
                f"no {WEIGHTS}", where=str(self._path.parent), fix="pickled adapters are not read"
            ) from error
        except SafetensorError as error:
            raise UserError("not a whole safetensors file", where=str(self._path)) from error


class Adapter:
    """What an adapter does to a base, by the name of the base's tensor.

    Attributes:
        layers: tensors something is added to.
        replaced: tensors that were trained whole (modules_to_save, biases): base name → key.
        first: base weights that PEFT saved along with an adapted embedding: base name → key.
        tokens: rows of an embedding that were trained alone: base name → key and row numbers.
        unties: it changes an embedding and the head that is tied to it differently.

    Raises:
        UserError: not an adapter that can be merged exactly, half a layer, ranks that disagree
            with the config, or nothing in the base to put it on, non-finite values.
    """

    def __init__(self, config: dict[str, Any], tensors: Tensors, base: Shapes, where: Path) -> None:
        self.where, self.config, self.tensors = str(where), config, tensors
        check_config(config, where / CONFIG)
        self.layers: dict[str, Layer] = {}
        self.replaced: dict[str, str] = {}
        self.first: dict[str, str] = {}
        self.tokens: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._base = base
        for module, keys in sorted(self._grouped().items()):
            self._take(module, keys)
        self._check_turned()
        self.unties = self._tie()
        for key in tensors.shapes:
            if not all_finite(tensors.get(key)):
                raise UserError(f"{key} is not finite", where=self.where, status=Exit.NON_FINITE)

    @classmethod
    def open(cls, folder: Path, base: Shapes) -> Adapter:
        """Open a folder in PEFT layout, for a base with tensors of these dtypes and shapes."""
        if not (folder / CONFIG).is_file():
            what = f"no {CONFIG} in it" if folder.is_dir() else "there is no such folder"
            raise UserError(what, where=str(folder), fix="give an adapter's folder in PEFT layout")
        config = read_json(folder / CONFIG)
        return cls(config, AdapterFile(folder), base, folder)

    @property
    def names(self) -> set[str]:
        """Every tensor of the base that changes."""
        return self.layers.keys() | self.trained_whole

    @property
    def trained_whole(self) -> set[str]:
        """Tensors, or rows of them, that are replaced and not added to."""
        saved = self.first.keys() - self.layers.keys()
        return saved | self.replaced.keys() | self.tokens.keys()

    def needs_whole(self, name: str) -> bool:
        """Whether all rows of a base tensor are needed at once."""
        return name in self.layers and self.layers[name].whole

    def step(self, name: str, weight: float = 1.0) -> Step:
        """What it does to blocks of rows of a base tensor, in float32."""
        if (key := self.replaced.get(name)) is not None:
            return lambda old, at: self.tensors.rows(key, at, at + len(old)).float()
        add: Step | None = None
        if name in self.layers:
            add = self.layers[name].step(self.tensors.get, weight)
        elif name in self.tokens:
            add = partial(_with_rows, self.tensors.get, *self.tokens[name])
        if (first := self.first.get(name)) is None:
            assert add is not None
            return add

        def on_saved(old: Tensor, at: int) -> Tensor:
            saved = self.tensors.rows(first, at, at + len(old)).float()
            return saved if add is None else add(saved, at)

        return on_saved

    def _grouped(self) -> dict[str, dict[str, str]]:
        """Module → role → key; keys that are no role of PEFT's replace a tensor."""
        if not self.tensors.shapes:
            raise UserError("the adapter holds no tensors", where=self.where)
        modules: dict[str, dict[str, str]] = {}
        for key in self.tensors.shapes:
            if not key.startswith(PREFIX):
                raise UserError(f"{key} is not part of a PEFT adapter", where=self.where)
            name = key.removeprefix(PREFIX)
            suffix = next((s for s in ROLES if name.endswith(s)), None)
            if suffix is not None:
                modules.setdefault(name.removesuffix(suffix), {})[ROLES[suffix]] = key
            elif name.endswith(TOKENS):
                self._take_tokens(name.removesuffix(TOKENS), key)
            elif ".lora_" in name:
                raise UserError(f"{key} is of a method that is not known here", where=self.where)
            else:
                self._take_whole(name, key)
        return modules

    def _take_whole(self, name: str, key: str) -> None:
        """A tensor that was saved whole: it replaces the base's, or lies below an adapter."""
        below = ".base_layer." in name
        found = self._find(name.replace(".base_layer.", "."), key)
        shape, stored = self.tensors.shapes[key], self._base.shape_of(found)[1]
        if stored != shape:
            raise UserError(
                f"{found} is {stored} in the base, {shape} in the adapter", where=self.where
            )
        (self.first if below else self.replaced)[found] = key

    def _take_tokens(self, module: str, key: str) -> None:
        found, setting = self._find(f"{module}.weight", key), self.config["trainable_token_indices"]
        if isinstance(setting, dict):
            named = (v for k, v in setting.items() if f".{module}".endswith(f".{k}"))
            setting = next(named, None)
        shape, stored = self.tensors.shapes[key], self._base.shape_of(found)[1]
        rows = tuple(setting) if isinstance(setting, list) else ()
        if [len(rows), *stored[1:]] != shape or not all(0 <= row < stored[0] for row in rows):
            raise UserError(
                f"trainable_token_indices names {len(rows)} rows of {found} {stored}, "
                f"{key} is {shape}",
                where=self.where,
                fix="config and weights must be of one adapter; save it again",
            )
        self.tokens[found] = key, rows

    def _tie(self) -> bool:
        """Do to a tied embedding and head what PEFT does; return whether they differ then.

        A saved base weight is loaded into the one matrix, so both get it; two that differ are of a
        model that an adapter before has untied. Adapters and modules_to_save are of one module,
        unless `ensure_weight_tying`; trained rows of the embedding are the head's too, unless
        that has its own.
        """
        pair = self._base.changes_tied(self.names)
        if pair is None:
            return False
        for name in pair.names:
            if name in self.replaced and not self._is_module_to_save(name):
                self.first[name] = self.replaced.pop(name)
        if self._are_equal(*(self.first.get(name) for name in pair.names)):
            _follow(self.first, *pair.names)
        if self.config.get("ensure_weight_tying"):
            _follow(self.replaced, *pair.names)
            scales = {self.layers[name].scale for name in pair.names if name in self.layers}
            _follow(self.layers, *pair.names) if len(scales) == 1 else None
        if pair.head not in self.tokens:
            _follow(self.tokens, *pair.names)
        kinds: tuple[dict[str, Any], ...] = (self.first, self.replaced, self.layers, self.tokens)
        return any(kind.get(pair.embedding) != kind.get(pair.head) for kind in kinds)

    def _are_equal(self, one: str | None, other: str | None) -> bool:
        """Whether two tensors of the adapter are equal, or one of them is not there."""
        if one is None or other is None:
            return True
        blocks = row_blocks(self.tensors.shapes[one])
        read = self.tensors.rows
        return all(torch.equal(read(one, *rows), read(other, *rows)) for rows in blocks)

    def _is_module_to_save(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        return any(module.endswith(saved) for saved in self.config.get("modules_to_save") or ())

    def _take(self, module: str, keys: dict[str, str]) -> None:
        bias = keys.pop("bias", None)
        name = self._find(f"{module}.weight", next(iter(keys.values()), bias or ""))
        if not {"a", "b"} <= keys.keys():
            raise UserError(f"{module} has only half an adapter", where=self.where)
        self.layers[name] = layer = self._layer(module, name, keys)
        if bias is not None:
            found = self._find(f"{module}.bias", bias)
            self.layers[found] = Layer({"bias": bias}, None, layer.scale, dims=1)

    def _find(self, name: str, key: str) -> str:
        """The base's name of a tensor."""
        found = self._base.stored_name(name)
        if found is None and is_outside_layers(name) and (tied := self._base.tied):
            found = tied.missing if tied.missing == name else None
        if found is None:
            fix = "merge into the base that the adapter was trained on"
            what = f"{key} matches nothing in the base (no {name})"
            raise UserError(what, where=self.where, fix=fix)
        if (kind := self._base.shape_of(found)[0]) not in FLOATS:
            what = f"{found} of the base is {kind}, not a plain float"
            fix = "merge into the float32, bfloat16 or float16 weights that it was made from"
            raise UserError(what, where=self.where, fix=fix)
        return found

    def _layer(self, module: str, name: str, keys: dict[str, str]) -> Layer:
        shape = self._base.shape_of(name)[1]
        a, b = (self.tensors.shapes[keys[role]] for role in "ab")
        embedding = "lora_embedding_" in keys["a"]
        turned = embedding or self._is_turned(a, b, shape)
        layer = by_config(self.config, module, keys, a[0] if a else 0)
        where = self.where
        if len(a) < 2 or len(a) != len(b) or a[0] != b[1] or layer.r not in (None, a[0]):
            raise UserError(
                f"ranks of {name} disagree: {CONFIG} says {layer.r}, A is {a}, B is {b}",
                where=where,
            )
        found = [a[1], b[0]] if turned else [b[0], a[1], *a[2:]]
        if found != shape or (len(shape) > 2 and len(shape) not in CONVOLUTIONS):
            raise UserError(f"{name} is {shape} in the base, {found} in the adapter", where=where)
        return Layer(keys, layer.r, layer.scale, layer.ranks, turned, len(shape))

    def _is_turned(self, a: list[int], b: list[int], shape: list[int]) -> bool:
        """By its shape; a square one by the config."""
        if len(a) != 2 or len(b) != 2 or a[1] == b[0]:
            return self._says_turned
        return [a[1], b[0]] == shape

    @property
    def _says_turned(self) -> bool:
        """What the config says, which PEFT puts right where the base has no such layers."""
        return bool(self.config.get("fan_in_fan_out")) and self._base.has_turned_layers

    def _check_turned(self) -> None:
        """PEFT writes one fan_in_fan_out for all layers, that of the last it put an adapter on."""
        shapes = {name: self._base.shape_of(name)[1] for name in self.layers}
        flat = [n for n, layer in self.layers.items() if "a" in layer.keys and layer.dims == 2]
        flat = [n for n in flat if "lora_embedding_" not in self.layers[n].keys["a"]]
        square = [n for n in flat if shapes[n][0] == shapes[n][1]]
        sides = {self.layers[n].turned for n in flat if n not in square}
        if square and len(sides | {self._says_turned}) > 1:
            raise UserError(
                f"layers lie both ways, and nothing says how {square[0]} does",
                where=self.where,
                fix="merge it with PEFT, which builds the model to find out",
            )


def _follow(changes: dict[str, Any], embedding: str, head: str) -> None:
    """Let one change, the embedding's of two, be that of both."""
    change = changes.get(embedding, changes.get(head))
    if change is not None:
        changes[embedding] = changes[head] = change


def _with_rows(
    read: Callable[[str], Tensor], key: str, rows: tuple[int, ...], old: Tensor, at: int
) -> Tensor:
    """A block of a table whose rows of these numbers were trained alone."""
    new, trained = old.float().clone(), read(key)
    for number, row in enumerate(rows):
        if at <= row < at + len(old):
            new[row - at] = trained[number]
    return new


def by_config(config: dict[str, Any], module: str, keys: dict[str, str], rank: int) -> Layer:
    """Rank and scale as PEFT finds them: by pattern, else the adapter's own."""
    if config["peft_type"] == "ADALORA":
        alpha = config["lora_alpha"]
        return Layer(keys, None, alpha if alpha > 0 else float(rank), config["init_r"])
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = _by_pattern(ranks, module, config["r"])
    alpha = _by_pattern(alphas, module, config["lora_alpha"])
    return Layer(keys, r, alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def _by_pattern(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches, as peft's get_pattern_key chooses it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
