"""The names of a model's tensors in its state dict and in its files."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dtrain.core.errors import UserError, first_line


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors of the files that are stacked, joined, split or transposed into entries of the model.

    Attributes:
        entries: names in the model of what it makes.
        empty: the model's tensors of these names; some rules ask for their shapes.
        sources: pattern of the rule → names in the files, in the order of the rule.
        rule: of transformers.
    """

    entries: tuple[str, ...]
    empty: dict[str, Tensor]
    sources: dict[str, list[str]]
    rule: WeightConverter
    config: PretrainedConfig

    @property
    def names(self) -> list[str]:
        """Names in the files."""
        return [name for names in self.sources.values() for name in names]

    def convert(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Make the entries.

        Args:
            read: name in the files → the tensor.

        Raises:
            UserError: the tensors do not fit together.
        """
        rule, first = deepcopy(self.rule), self.entries[0]
        for pattern, names in self.sources.items():
            for name in names:
                rule.add_tensor(first, name, pattern, partial(read, name))  # type: ignore[arg-type]
        try:
            asked: Any = SimpleNamespace(get_parameter=self.empty.__getitem__)
            made: dict[str, Any] = rule.convert(first, model=asked, config=self.config)
        except Exception as error:  # torch's, on tensors of other shapes
            raise UserError(
                f"the files' tensors do not make {first}: {first_line(error)}",
                fix="weights and config.json must belong to the same model; download them again",
            ) from error
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}


@dataclass(frozen=True)
class ExpertPart:
    """A matrix in the files that is a range of rows of one expert.

    Attributes:
        name: in the files.
        expert: number of the expert.
        share: which of the equal ranges of its rows, and of how many.
    """

    name: str
    expert: int
    share: tuple[int, int]


def expert_parts(conversion: Conversion) -> list[ExpertPart]:
    """The parts of a parameter [E, rows, columns] that a conversion makes of matrices.

    The conversion itself is asked, with small matrices of numbers that say where they come from.

    Returns:
        Nothing if it does something else than to stack experts and to join their rows.
    """
    marks = {n: torch.arange(4).view(2, 2) + 4 * i for i, n in enumerate(conversion.names)}
    try:
        (made,) = conversion.convert(marks.__getitem__).values()
        experts, rows, columns = made.shape
    except (UserError, ValueError):
        return []
    if columns != 2 or rows % 2 or experts * rows != 2 * len(marks):
        return []
    parts = []
    for name, mark in marks.items():
        expert, row, _ = (made == mark[0, 0]).nonzero()[0].tolist()
        if row % 2 or not torch.equal(made[expert, row : row + 2], mark):
            return []
        parts.append(ExpertPart(name, expert, (row // 2, rows // 2)))
    return parts


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
