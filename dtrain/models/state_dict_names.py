"""The names of a model's tensors in its state dict and in its files."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dtrain.models.conversion import Conversion


@dataclass(frozen=True)
class StateDictNames:
    """How the entries of a model's state dict correspond to the tensors in its files.

    Attributes:
        stored: name in the model → name in the files, for equal tensors.
        conversions: how the others are made.
        missing: entries of the model that no file has, except tied and ignorable ones.
        unexpected: names in the files without an entry in the model, except ignorable ones.
    """

    stored: dict[str, str]
    conversions: list[Conversion]
    missing: list[str]
    unexpected: list[str]

    @cached_property
    def converted(self) -> dict[str, Conversion]:
        """Entry → what makes it, for entries that are not equal to one tensor."""
        return {entry: x for x in self.conversions for entry in x.empty}

    def among(self, entries: Container[str]) -> StateDictNames:
        """The same, but only what makes these entries."""
        return replace(
            self,
            stored={entry: name for entry, name in self.stored.items() if entry in entries},
            conversions=[c for c in self.conversions if c.entries[0] in entries],
            missing=[entry for entry in self.missing if entry in entries],
        )


def match_state_dict(model: PreTrainedModel, names: Iterable[str]) -> StateDictNames:
    """Match a model's state dict with the names in its files, as `from_pretrained` does.

    Args:
        model: its parameters may be on the meta device.
        names: the names of the tensors in the files.
    """
    entries: dict[str, Tensor] = model.state_dict(keep_vars=True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    stored: dict[str, str] = {}
    converted: dict[str, dict[str, list[str]]] = {}  # first entry → pattern → names
    unexpected: set[str] = set()
    for name in sorted(names, key=dot_natural_key):
        entry, pattern = rename_source_key(name, renamings, converters, prefix, entries)
        if entry not in entries and name in entries:
            entry, pattern = rename_source_key(name, [], [], prefix, entries)
        if entry not in entries:
            unexpected.add(entry)
        elif pattern is not None:
            converted.setdefault(entry, {}).setdefault(pattern, []).append(name)
        else:
            stored[entry] = name
    conversions = _conversions(converted, converters, model.config, entries)
    filled = {id(entries[entry]) for entry in stored}  # tied parameters are the same object
    filled |= {id(entries[e]) for x in conversions for e in x.entries if e in entries}
    missing = {entry for entry, tensor in entries.items() if id(tensor) not in filled}
    # removes the names that transformers ignores
    report = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(report)  # type: ignore[arg-type] # reads these two
    return StateDictNames(
        stored, conversions, sorted(report.missing_keys), sorted(report.unexpected_keys)
    )


def _conversions(
    converted: dict[str, dict[str, list[str]]],
    converters: list[WeightConverter],
    config: PretrainedConfig,
    tensors: dict[str, Tensor],
) -> list[Conversion]:
    """The conversions, each with the entries that its rule makes."""
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    conversions = []
    for first, sources in converted.items():
        rule = rule_of[next(iter(sources))]
        ordered = {p: sources[p] for p in rule.source_patterns if p in sources}
        head, *others = rule.target_patterns
        entries = (first, *(first.replace(head, other) for other in others))
        empty = {e: tensors[e].detach().to("meta") for e in entries if e in tensors}
        conversions.append(Conversion(entries, empty, ordered, rule, config))
    return conversions
