"""The protocol of a metric of generated answers, and how the metrics of a set are built.

No module here imports torch: `dtrain check` builds the metrics of a recipe to find their errors.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.config.generation import METRICS, GenerationSet
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError, UserErrors
from dtrain.core.lazy_import import import_object
from dtrain.data.conversations import Conversation
from dtrain.monitoring.scores import Score, mean_score

RowScores = dict[str, float | None]


@dataclass(frozen=True)
class PromptRow:
    """A row of a set of prompts.

    Attributes:
        prompt: the turns before the answer.
        reference: the assistant's message that the row has as the answer; None without one.
        columns: the row as it is in the file.
        location: file and line.
    """

    prompt: Conversation
    reference: dict[str, Any] | None
    columns: Mapping[str, Any]
    location: str

    @property
    def conversation(self) -> Conversation:
        """The prompt, with the reference if there is one."""
        messages = [*self.prompt.messages, *([self.reference] if self.reference else [])]
        return replace(self.prompt, messages=messages)

    @property
    def reference_text(self) -> str:
        """The text of the reference; empty without one."""
        return str(self.reference["content"]) if self.reference else ""

    @property
    def prompt_text(self) -> str:
        """The prompt for a reader: its text, or its turns with their roles."""
        turns = self.prompt.messages
        if len(turns) == 1:
            return str(turns[0]["content"])
        return "\n\n".join(f"{turn['role']}: {_shown(turn)}" for turn in turns)

    @property
    def shown_reference(self) -> str | None:
        """The reference for a reader, calls included; None without one."""
        return None if self.reference is None else _shown(self.reference)


def _shown(turn: Mapping[str, Any]) -> str:
    """The text of a turn, and its calls as JSON."""
    calls = turn.get("tool_calls")
    return "\n".join(filter(None, [turn["content"], json.dumps(calls) if calls else ""]))


class MetricFailure(Exception):
    """A metric has no score for these answers; the message says why."""


@dataclass(frozen=True)
class MetricResult:
    """The scores of a model's answers by one metric.

    Attributes:
        rows: scores of each answer by name; None where an answer has none.
        scores: of all answers together.
        note: what a reader of the scores should know; may be empty.
    """

    rows: list[RowScores]
    scores: dict[str, Score]
    note: str = ""


class Metric(ABC):
    """Scores the answers of a set.

    Args:
        settings: of the set.
        where: its key, for messages.

    Raises:
        UserError: a setting cannot be used.
    """

    def __init__(self, settings: GenerationSet, where: str) -> None:
        self.settings, self.where = settings, where

    @abstractmethod
    def measure(self, rows: Sequence[PromptRow], answers: Sequence[str], run: Path) -> MetricResult:
        """Score the answers to all rows of a set.

        Args:
            run: the run folder.

        Raises:
            MetricFailure: there is no score.
        """

    def check_row(self, row: PromptRow, rendered: str) -> None:
        """Check a row before any model answers it.

        Args:
            rendered: the row with its reference as the chat template writes it; empty without one.

        Raises:
            UserError: the metric cannot score answers to it.
        """
        return

    def inputs(self) -> str:
        """Content of files outside of the recipe that decides the scores."""
        return ""

    def problem(self) -> str:
        """Why the metric would fail if it were measured now; empty if nothing is known."""
        return ""


class RowMetric(Metric):
    """A metric whose score is the mean over the answers."""

    @abstractmethod
    def score(self, row: PromptRow, answer: str) -> RowScores:
        """Scores of one answer by name."""

    def measure(self, rows: Sequence[PromptRow], answers: Sequence[str], run: Path) -> MetricResult:
        scored = [self.score(row, answer) for row, answer in zip(rows, answers, strict=True)]
        return means_of(scored)


def means_of(rows: list[RowScores], note: str = "") -> MetricResult:
    """The mean of each score over the rows that have it."""
    names = dict.fromkeys(name for scores in rows for name in scores)
    means = {name: mean_score([scores[name] for scores in rows]) for name in names}
    return MetricResult(rows, means, note)


def build_metrics(settings: GenerationSet, name: str) -> dict[str, Metric]:
    """The metrics of a set, by their kind.

    Args:
        name: of the set.

    Raises:
        UserError: a setting of a metric cannot be used.
    """
    metrics: dict[str, Metric] = {}
    for kind in settings.metrics:
        implementation: type[Metric] = import_object(METRICS[kind].implementation)
        metrics[kind] = implementation(settings, f"evaluation.generation.{name}")
    return metrics


def unreachable(recipe: Recipe) -> Iterator[str]:
    """What metrics need from other machines and do not get from this one."""
    for name, settings in recipe.evaluation.generation.items():
        for metric in build_metrics(settings, name).values():
            if problem := metric.problem():
                yield f"{metric.where}: {problem}"


def check_metrics(recipe: Recipe) -> None:
    """Check what the metrics of a recipe read: a schema, a pattern, a function, a URL.

    Raises:
        UserError: something cannot be used.
    """
    errors: list[UserError] = []
    for name, settings in recipe.evaluation.generation.items():
        try:
            build_metrics(settings, name)
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)
