"""An adapter in PEFT layout, checked against the base that it is merged into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.config.methods.patterns import match_names
from dtrain.core.errors import Exit, UserError
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.distributed.tensor_utils import all_finite
from dtrain.merge.adapter_tensors import AdapterFile, AdapterTensors, vera_as_lora
from dtrain.merge.base_tensors import FLOATS, BaseTensors, is_outside_layers
from dtrain.merge.expert_delta import ExpertDelta
from dtrain.merge.weight_delta import (
    CONVOLUTIONS,
    SAVE_AGAIN,
    BlockUpdate,
    LayerDelta,
    check_config,
    check_roles,
    layer_from_config,
)
from dtrain.models.peft_format import WEIGHTS, read_adapter_config
from dtrain.models.stored_tensors import row_blocks

EXPERT_TENSORS = 4  # kept: A and B of two parameters
TOKENS = ".token_adapter.trainable_tokens_delta"
ROLES = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "m",
    ".lora_embedding_A": "a", ".lora_embedding_B": "b",
    ".lora_A": "a", ".lora_B": "b", ".lora_E": "e",
    ".lora_B.bias": "bias",
    ".ia3_l": "s",
}  # fmt: skip


class MergeableAdapter:
    """The changes that an adapter makes to a base, by the name of the base's tensor.

    Attributes:
        layers: tensors that a product is added to.
        experts: tensors of experts that products are added to.
        replaced: tensors that were trained whole (modules_to_save, biases): base name → key.
        saved_base: base weights that PEFT saved along with an adapted embedding: base name → key.
        token_rows: rows of an embedding that were trained alone: base name → key, row indices.
        unties: it changes a tied embedding and output head differently.

    Raises:
        UserError: the adapter cannot be merged exactly, has half a layer or ranks that disagree
            with the config, matches nothing in the base, or has non-finite values.
    """

    def __init__(
        self, config: dict[str, Any], tensors: AdapterTensors, base: BaseTensors, where: Path
    ) -> None:
        check_config(config, where / ADAPTER_CONFIG)
        if config["peft_type"] == "VERA":
            config, tensors = vera_as_lora(config, tensors, base, str(where))
        self.where, self.config, self.tensors = str(where), config, tensors
        self.layers: dict[str, LayerDelta] = {}
        self.experts: dict[str, ExpertDelta] = {}
        self.replaced: dict[str, str] = {}
        self.saved_base: dict[str, str] = {}
        self.token_rows: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._base = base
        for module, keys in sorted(self._group_keys().items()):
            self._take_layer(module, keys)
        self._check_transposed()
        self.unties = self._tie()
        for key in tensors.shapes:
            if not all_finite(tensors.get(key)):
                raise UserError(f"{key} is not finite", where=self.where, status=Exit.NON_FINITE)

    @classmethod
    def open(cls, folder: Path, base: BaseTensors) -> MergeableAdapter:
        """Open a folder in PEFT layout, to merge it into this base."""
        if not (folder / ADAPTER_CONFIG).is_file():
            message = f"no {ADAPTER_CONFIG} in it" if folder.is_dir() else "there is no such folder"
            raise UserError(
                message, where=str(folder), fix="give an adapter's folder in PEFT layout"
            )
        adapter = cls(read_adapter_config(folder), AdapterFile(folder), base, folder)
        adapter._check_whole()
        return adapter

    @property
    def names(self) -> set[str]:
        """Names of the base's tensors that change."""
        return self.layers.keys() | self.experts.keys() | self.trained_whole

    @property
    def trained_whole(self) -> set[str]:
        """Names of tensors that are replaced, in whole or in rows, instead of added to."""
        saved = self.saved_base.keys() - self.layers.keys()
        return saved | self.replaced.keys() | self.token_rows.keys()

    def needs_all_rows(self, name: str) -> bool:
        """Return whether all rows of a base tensor are needed at once."""
        return name in self.layers and self.layers[name].needs_all_rows

    def block_update(self, name: str, weight: float = 1.0) -> BlockUpdate:
        """Return the function that changes blocks of rows of a base tensor, in float32."""
        if (key := self.replaced.get(name)) is not None:
            return lambda old, row: self.tensors.rows(key, row, row + len(old)).float()
        if (experts := self.experts.get(name)) is not None:
            return experts.block_update(self._read_experts, weight)
        update: BlockUpdate | None = None
        if name in self.layers:
            update = self.layers[name].block_update(self.tensors.get, weight)
        elif name in self.token_rows:
            update = partial(_replace_token_rows, self.tensors.get, *self.token_rows[name])
        if (saved_key := self.saved_base.get(name)) is None:
            assert update is not None
            return update

        def update_saved(old: Tensor, row: int) -> Tensor:
            saved = self.tensors.rows(saved_key, row, row + len(old)).float()
            return saved if update is None else update(saved, row)

        return update_saved

    @cached_property
    def _read_experts(self) -> Callable[[str], Tensor]:
        """Reads tensors that hundreds of experts share, once."""
        return lru_cache(maxsize=EXPERT_TENSORS)(self.tensors.get)

    def _group_keys(self) -> dict[str, dict[str, str]]:
        """Module → role → key; a key with no role replaces a tensor."""
        if not self.tensors.shapes:
            raise UserError("the adapter has no tensors", where=self.where)
        modules: dict[str, dict[str, str]] = {}
        for key in self.tensors.shapes:
            if not key.startswith(PEFT_PREFIX):
                raise UserError(f"{key} does not belong to a PEFT adapter", where=self.where)
            name = key.removeprefix(PEFT_PREFIX)
            suffix = next((s for s in ROLES if name.endswith(s)), None)
            if suffix is not None:
                modules.setdefault(name.removesuffix(suffix), {})[ROLES[suffix]] = key
            elif name.endswith(TOKENS):
                self._take_tokens(name.removesuffix(TOKENS), key)
            elif ".lora_" in name:
                raise UserError(f"{key} belongs to an unknown method", where=self.where)
            else:
                self._take_whole(name, key)
        return modules

    def _take_whole(self, name: str, key: str) -> None:
        """Take a tensor that was saved whole: it replaces the base's, or an adapter adds to it."""
        is_adapted = ".base_layer." in name
        base_name = self._find(name.replace(".base_layer.", "."), key)
        shape, stored = self.tensors.shapes[key], self._base.shape_of(base_name)[1]
        if stored != shape:
            raise UserError(
                f"{base_name} is {stored} in the base, {shape} in the adapter", where=self.where
            )
        (self.saved_base if is_adapted else self.replaced)[base_name] = key

    def _take_tokens(self, module: str, key: str) -> None:
        name = self._find(f"{module}.weight", key)
        setting = self.config.get("trainable_token_indices")
        if isinstance(setting, dict):
            matching = (v for k, v in setting.items() if f".{module}".endswith(f".{k}"))
            setting = next(matching, None)
        shape, stored = self.tensors.shapes[key], self._base.shape_of(name)[1]
        rows = tuple(setting) if isinstance(setting, list) else ()
        if [len(rows), *stored[1:]] != shape or not all(0 <= row < stored[0] for row in rows):
            raise UserError(
                f"trainable_token_indices names {len(rows)} rows of {name} {stored}, "
                f"{key} is {shape}",
                where=self.where,
                fix=SAVE_AGAIN,
            )
        self.token_rows[name] = key, rows

    def _tie(self) -> bool:
        """Change a tied embedding and head as PEFT does; return whether they differ then.

        A saved base weight is loaded into the one matrix, so both get it; two that differ belong
        to a model that an earlier adapter untied. Adapters and modules_to_save change one module
        only, unless `ensure_weight_tying`; trained rows of the embedding also change the head,
        unless it has its own.
        """
        pair = self._base.tied_pair_among(self.names)
        if pair is None:
            return False
        for name in pair.names:
            if name in self.replaced and not self._is_module_to_save(name):
                self.saved_base[name] = self.replaced.pop(name)
        if self._are_equal(*(self.saved_base.get(name) for name in pair.names)):
            _follow(self.saved_base, *pair.names)
        whole = [self.replaced[name] for name in pair.names if name in self.replaced]
        if len(whole) == 2 and self._are_equal(*whole):  # trained as one
            _follow(self.replaced, *pair.names)
        if self.config.get("ensure_weight_tying"):
            _follow(self.replaced, *pair.names)
            scales = {self.layers[name].scale for name in pair.names if name in self.layers}
            if len(scales) == 1:
                _follow(self.layers, *pair.names)
        if pair.head not in self.token_rows:
            _follow(self.token_rows, *pair.names)
        changes: list[dict[str, Any]] = [self.saved_base, self.replaced, self.layers]
        changes.append(self.token_rows)
        return any(kind.get(pair.embedding) != kind.get(pair.head) for kind in changes)

    def _are_equal(self, first: str | None, second: str | None) -> bool:
        """Return whether two tensors of the adapter are equal, or one of them is missing."""
        if first is None or second is None:
            return True
        blocks = row_blocks(self.tensors.shapes[first])
        read = self.tensors.rows
        return all(torch.equal(read(first, *rows), read(second, *rows)) for rows in blocks)

    def _is_module_to_save(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        return any(module.endswith(saved) for saved in self.config.get("modules_to_save") or ())

    def _check_whole(self) -> None:
        """Check that all weights that the config names have tensors; PEFT would make new ones."""
        if self.experts and not self.config.get("target_parameters"):
            message = f"{WEIGHTS} adapts {min(self.experts)}, and {ADAPTER_CONFIG} names no "
            raise UserError(f"{message}target_parameters", where=self.where, fix=SAVE_AGAIN)
        lacks = []
        for name in self._base.adapted_by(self.config):
            parts = [part.name for part in self._base.expert_parts.get(name, ())]
            stored = [x for x in (self._base.stored_name(name), *parts) if x]
            if stored and self.names.isdisjoint(stored):
                lacks.append(name)
        if self.config.get("trainable_token_indices") and not self.token_rows:
            lacks.append("trainable_token_indices")
        if lacks:
            message = f"{ADAPTER_CONFIG} names {lacks[0]}, of which {WEIGHTS} has no tensors"
            raise UserError(message, where=self.where, fix=SAVE_AGAIN)

    def _take_layer(self, module: str, keys: dict[str, str]) -> None:
        if "s" not in keys:
            check_roles(self.config, module, keys, self.where)
        if {"a", "b"} == keys.keys() and (parameter := self._expert_parameter(module)):
            self._take_experts(parameter, keys)
            return
        bias = keys.pop("bias", None)
        name = self._find(f"{module}.weight", next(iter(keys.values()), bias or ""))
        if "s" in keys:
            self._take_factors(module, name, keys)
            return
        if not {"a", "b"} <= keys.keys():
            raise UserError(f"{module} has only half of an adapter", where=self.where)
        self.layers[name] = layer = self._layer(module, name, keys)
        if bias is not None:
            bias_name = self._find(f"{module}.bias", bias)
            self.layers[bias_name] = LayerDelta({"bias": bias}, None, layer.scale, dims=1)

    def _expert_parameter(self, module: str) -> str | None:
        """The parameter of experts that PEFT's wrapper adapts, by the model's name.

        The wrapper of the first parameter is the innermost.
        """
        if self._base.stored_name(f"{module}.weight"):
            return None
        stem, depth = module.replace(".base_layer", ""), module.count(".base_layer")
        targets = self.config.get("target_parameters")  # None of a checkpoint with all-linear
        named = [f"{stem}.{name}" for name in self._base.expert_parameters(stem)]
        adapted = [n for n in named if targets is None or match_names([n], targets)]
        return adapted[-1 - depth] if depth < len(adapted) else None

    def _take_experts(self, parameter: str, keys: dict[str, str]) -> None:
        """Take the adapter of a parameter of experts, for each tensor that it is stored as."""
        a, b = (self.tensors.shapes[keys[role]] for role in "ab")
        layer = layer_from_config(self.config, parameter, keys, 0)
        r, stored = layer.r or 0, self._base.stored_name(parameter)
        parts = self._base.expert_parts.get(parameter, [])
        if stored:
            experts = self._base.shape_of(stored)[1][0]
        else:
            experts = len({part.expert for part in parts})
            if not experts and (reason := self._base.why_not_written(parameter)):
                raise UserError(reason, where=str(self._base.folder))
        if len(a) != 2 or not experts or [a[0], b[1]] != [r * experts] * 2:
            raise UserError(
                f"{parameter} has {experts} experts in the base; {ADAPTER_CONFIG} says rank {r}, "
                f"A is {a}, B is {b}",
                where=self.where,
                fix="merge into the base that the adapter was trained on",
            )
        delta = ExpertDelta(keys, r, layer.scale, experts)
        if stored:
            transposed = self._base.has_transposed_experts(parameter)
            product = [experts, *((a[1], b[0]) if transposed else (b[0], a[1]))]
            self._add_experts(stored, product, replace(delta, transposed=transposed))
        for part in parts:
            at, count = part.share
            rows = b[0] // count
            part_delta = replace(delta, expert=part.expert, first_row=at * rows)
            self._add_experts(part.name, [rows, a[1]], part_delta)

    def _add_experts(self, stored: str, product: list[int], delta: ExpertDelta) -> None:
        dtype, shape = self._base.shape_of(stored)
        if shape != product or dtype not in FLOATS:
            message = f"{stored} is {dtype} {shape} in the base, {product} in the adapter"
            raise UserError(message, where=self.where)
        self.experts[stored] = delta

    def _take_factors(self, module: str, name: str, keys: dict[str, str]) -> None:
        """Take IA3's factors; those of outputs scale the bias too."""
        factors, shape = self.tensors.shapes[keys["s"]], self._base.shape_of(name)[1]
        transposed = self._config_says_transposed
        outputs, inputs = shape[transposed], shape[not transposed]
        if len(shape) != 2 or factors not in ([outputs, 1], [1, inputs]):
            raise UserError(
                f"{name} is {shape} in the base, {factors} in the adapter", where=self.where
            )
        layer = LayerDelta(keys, None, 1.0, transposed=transposed)
        self.layers[name] = layer
        bias = self._base.stored_name(f"{module}.bias")
        if factors == [outputs, 1] and bias is not None:
            self.layers[bias] = replace(layer, transposed=False, dims=1)

    def _find(self, name: str, key: str) -> str:
        """Return the base's name of a tensor."""
        stored = self._base.stored_name(name)
        if stored is None and is_outside_layers(name) and (tied := self._base.tied):
            stored = tied.missing if tied.missing == name else None
        if stored is None:
            fix = "merge into the base that the adapter was trained on"
            message = f"{key} matches nothing in the base (no {name})"
            if reason := self._base.model_error:  # which would say what the files name otherwise
                message += f"; the base's model cannot be built: {reason}"
                fix = f"correct the base's config.json, or {fix}"
            raise UserError(message, where=self.where, fix=fix)
        if (dtype := self._base.shape_of(stored)[0]) not in FLOATS:
            message = f"{stored} of the base is {dtype}, not a plain float"
            fix = "merge into the float32, bfloat16 or float16 weights that it was made from"
            raise UserError(message, where=self.where, fix=fix)
        return stored

    def _layer(self, module: str, name: str, keys: dict[str, str]) -> LayerDelta:
        shape = self._base.shape_of(name)[1]
        a, b = (self.tensors.shapes[keys[role]] for role in "ab")
        is_embedding = "lora_embedding_" in keys["a"]
        transposed = is_embedding or self._is_transposed(a, b, shape)
        layer = layer_from_config(self.config, module, keys, a[0] if a else 0)
        if len(a) < 2 or len(a) != len(b) or a[0] != b[1] or layer.r not in (None, a[0]):
            says = f"{ADAPTER_CONFIG} says {layer.r}, A is {a}, B is {b}"
            raise UserError(f"ranks of {name} disagree: {says}", where=self.where)
        product = [a[1], b[0]] if transposed else [b[0], a[1], *a[2:]]
        if product != shape or (len(shape) > 2 and len(shape) not in CONVOLUTIONS):
            message = f"{name} is {shape} in the base, {product} in the adapter"
            raise UserError(message, where=self.where)
        return replace(layer, transposed=transposed, dims=len(shape))

    def _is_transposed(self, a: list[int], b: list[int], shape: list[int]) -> bool:
        """Return whether a layer is stored as [in, out]; the config decides for a square one."""
        if len(a) != 2 or len(b) != 2 or a[1] == b[0]:
            return self._config_says_transposed
        return [a[1], b[0]] == shape

    @property
    def _config_says_transposed(self) -> bool:
        """The config's setting; PEFT ignores it where the base has no such layers."""
        return bool(self.config.get("fan_in_fan_out")) and self._base.has_transposed_layers

    def _check_transposed(self) -> None:
        """Check square layers: PEFT writes one fan_in_fan_out for all, that of the last layer."""
        shapes = {name: self._base.shape_of(name)[1] for name in self.layers}
        flat = [n for n, layer in self.layers.items() if "a" in layer.keys and layer.dims == 2]
        flat = [n for n in flat if "lora_embedding_" not in self.layers[n].keys["a"]]
        square = [n for n in flat if shapes[n][0] == shapes[n][1]]
        sides = {self.layers[n].transposed for n in flat if n not in square}
        if square and len(sides | {self._config_says_transposed}) > 1:
            raise UserError(
                f"some layers are stored transposed, others not, and {square[0]} is square: "
                "nothing says how it is stored",
                where=self.where,
                fix="merge it with PEFT, which builds the model to find out",
            )


def _follow(changes: dict[str, Any], embedding: str, head: str) -> None:
    """Apply the change of one to both; the embedding's, if both have one."""
    change = changes.get(embedding, changes.get(head))
    if change is not None:
        changes[embedding] = changes[head] = change


def _replace_token_rows(
    read: Callable[[str], Tensor], key: str, tokens: tuple[int, ...], old: Tensor, row: int
) -> Tensor:
    """Return a block of an embedding with its trained rows in place."""
    new, trained = old.float().clone(), read(key)
    for index, token in enumerate(tokens):
        if row <= token < row + len(old):
            new[token - row] = trained[index]
    return new
