"""Runs that differ only by their seed, and whether two such groups differ by more than chance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import mean, stdev

from dtrain.monitoring.run_record import RunRecord
from dtrain.monitoring.uncertainty import MeanDifference, compare_means


@dataclass(frozen=True)
class SeedGroup:
    """Runs with equal recipes, apart from seed, name and folder.

    Attributes:
        name: of its first run.
        records: its runs, with different seeds.
    """

    name: str
    records: list[RunRecord]

    def losses(self, set_name: str) -> dict[int, float]:
        """Seed → last held-out loss of a set, of the runs that measured it."""
        last = {
            seed_of(record): losses.last
            for record in self.records
            for losses in record.losses
            if losses.name == set_name
        }
        return {seed: loss for seed, loss in last.items() if loss is not None}


def seed_of(record: RunRecord) -> int:
    """The seed of a run's recipe."""
    return int(record.recipe.get("seed") or 0)


def seed_groups(records: Sequence[RunRecord], names: Sequence[str]) -> list[SeedGroup]:
    """The runs in groups, in the order of their first runs; empty without two runs in a group.

    Args:
        names: of the runs, for the groups.
    """
    groups: dict[str, SeedGroup] = {}
    for record, name in zip(records, names, strict=True):
        groups.setdefault(_settings(record), SeedGroup(name, [])).records.append(record)
    grouped = list(groups.values())
    repeats = any(
        len({seed_of(r) for r in group.records}) < len(group.records) for group in grouped
    )
    return [] if repeats or all(len(group.records) < 2 for group in grouped) else grouped


def _settings(record: RunRecord) -> str:
    """A run's recipe as text, without what differs between runs of a group."""
    recipe = deepcopy(record.recipe)
    for key in ("seed", "name"):
        recipe.pop(key, None)
    for key in ("folder", "reuse"):
        (recipe.get("output") or {}).pop(key, None)
    return json.dumps(recipe, sort_keys=True, default=str)


def group_head(groups: Sequence[SeedGroup]) -> list[str]:
    """The names of the groups, each with its number of runs."""
    return [
        f"{group.name} ({len(group.records)} {'seeds' if len(group.records) > 1 else 'seed'})"
        for group in groups
    ]


def group_rows(groups: Sequence[SeedGroup]) -> Iterator[list[str]]:
    """A row for each evaluation set: its mean and spread in each group."""
    for name in set_names(groups):
        yield [name, *(_mean_text(group.losses(name)) for group in groups)]


def set_names(groups: Sequence[SeedGroup]) -> list[str]:
    """The evaluation sets of all groups."""
    records = [record for group in groups for record in group.records]
    return list(dict.fromkeys(losses.name for record in records for losses in record.losses))


def _mean_text(losses: Mapping[int, float]) -> str:
    if not losses:
        return "—"
    spread = f" ± {stdev(losses.values()):.4f}" if len(losses) > 1 else ""
    return f"{mean(losses.values()):.4f}{spread}"


def verdicts(groups: Sequence[SeedGroup]) -> Iterator[str]:
    """In words, whether each group differs from the first one by more than chance."""
    if not groups:
        return
    first = groups[0]
    for name in set_names(groups):
        for group in groups[1:]:
            pair = f"{name}, {group.name} against {first.name}"
            difference = difference_of(first.losses(name), group.losses(name))
            if difference is None:
                yield f"{pair}: a group with one seed shows no spread; run more seeds"
            else:
                yield f"{pair}: {difference}"


def difference_of(before: Mapping[int, float], after: Mapping[int, float]) -> MeanDifference | None:
    """The difference of two groups, paired if their seeds are the same.

    Args:
        before, after: seed → loss.

    Returns:
        None with fewer than two runs in a group.
    """
    if min(len(before), len(after)) < 2:
        return None
    if before.keys() == after.keys():
        seeds = sorted(before)
        return compare_means([before[s] for s in seeds], [after[s] for s in seeds], is_paired=True)
    return compare_means([*before.values()], [*after.values()], is_paired=False)
