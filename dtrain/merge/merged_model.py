"""The content of a merged model: changes of its base's tensors, and the files to go with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.core.coded_tensors import without_quantization
from dtrain.core.files import json_text, read_object
from dtrain.core.log import say
from dtrain.core.weight_files import INDEX, SINGLE, read_weight_map
from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.stream import AddedTensor, ChangeBlocks
from dtrain.models.stored_tensors import StoredTensor


@dataclass(frozen=True)
class MergedModel:
    """The content of a merged model, before it is written.

    Attributes:
        changes: how the base's tensors change, by name.
        added: tensors that the base does not store as such, by name.
        files: text files that replace the base's or are added to them, by name.
        description: plain values that identify the content, for the plan and the manifest.
        dropped: tensors of the base that are left out, by name.
    """

    changes: Mapping[str, ChangeBlocks]
    added: Mapping[str, AddedTensor]
    files: Mapping[str, str]
    description: dict[str, Any]
    dropped: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def more_bytes(self) -> int:
        """How much larger than the base it is."""
        new = sum(tensor.old.nbytes for tensor in self.added.values())
        return new - sum(tensor.nbytes for tensor in self.dropped.values())

    def decoded(self, base: BaseTensors) -> MergedModel:
        """Return the same with the values of all that the base stores as codes."""
        if not base.files.decoded:
            return self
        formats = " and ".join(base.files.formats)
        say(
            f"the base is stored in {formats}; the merged model is written in bfloat16, larger and "
            "without quantization_config"
        )
        changes = dict(self.changes)
        added = {
            name: AddedTensor(tensor, changes.pop(name, _unchanged))
            for name, tensor in base.files.decoded.items()
        }
        text = self.files.get("config.json")
        config = json.loads(text) if text else read_object(base.folder / "config.json")
        files = {**self.files, "config.json": json_text(without_quantization(config))}
        return MergedModel(
            changes, {**self.added, **added}, files, self.description, base.files.codes
        )

    def indexed(self, base: Path) -> MergedModel:
        """Return the same with an index of its own, if its shards hold other tensors."""
        if not self.added or (base / SINGLE).is_file():
            return self
        index, weight_map = read_object(base / INDEX), read_weight_map(base / INDEX)
        kept = {name: file for name, file in weight_map.items() if name not in self.dropped}
        index["weight_map"] = kept | {n: x.old.path.name for n, x in self.added.items()}
        totals = index.get("metadata")
        totals = totals if isinstance(totals, dict) else {}
        elements = sum(prod(tensor.old.shape) for tensor in self.added.values())
        elements -= sum(prod(tensor.shape) for tensor in self.dropped.values())
        for key, more in (("total_size", self.more_bytes), ("total_parameters", elements)):
            if isinstance(totals.get(key), int):
                totals[key] += more
        return replace(self, files={**self.files, INDEX: json_text(index)})


def _unchanged(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    return blocks
