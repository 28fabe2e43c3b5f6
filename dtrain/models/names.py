"""A model's parameters and buffers by the names that its files give them.

The two differ for models inside a wrapper (`language_model.model.…`) and for layouts that
transformers changed since a model was published; transformers' own tables translate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dtrain.core.errors import UserError


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
