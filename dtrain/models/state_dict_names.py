"""The names of a model's tensors in its state dict and in its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class StateDictNames:
    """How the entries of a model's state dict correspond to the tensors in its files.

    Attributes:
        stored: name in the model → name in the files, for equal tensors.
        converted: names in the files of tensors that are split, joined or transposed on loading.
        missing: entries of the model that no file has, except tied and ignorable ones.
        unexpected: names in the files without an entry in the model, except ignorable ones.
    """

    stored: dict[str, str]
    converted: list[str]
    missing: list[str]
    unexpected: list[str]


def match_state_dict(model: PreTrainedModel, names: Iterable[str]) -> StateDictNames:
    """Match a model's state dict with the names in its files, as `from_pretrained` does.

    Args:
        model: its parameters may be on the meta device.
        names: the names of the tensors in the files.
    """
    entries: dict[str, Tensor] = model.state_dict(keep_vars=True)
    conversions = get_model_conversion_mapping(model)
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    stored, converted, unexpected = {}, [], set()
    for name in names:
        entry, pattern = rename_source_key(name, renamings, converters, prefix, entries)
        if entry not in entries and name in entries:
            entry, pattern = rename_source_key(name, [], [], prefix, entries)
        if entry not in entries:
            unexpected.add(entry)
        elif pattern is not None:
            converted.append(name)
        else:
            stored[entry] = name
    filled = {id(entries[entry]) for entry in stored}  # tied parameters are the same object
    missing = {entry for entry, tensor in entries.items() if id(tensor) not in filled}
    # removes the names that transformers ignores
    report = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(report)  # type: ignore[arg-type] # reads these two
    return StateDictNames(
        stored, converted, sorted(report.missing_keys), sorted(report.unexpected_keys)
    )
