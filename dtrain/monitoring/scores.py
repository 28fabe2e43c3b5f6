"""Scores of a run's models in evaluation.json: values with their uncertainty, before and after.

evaluation.json has them as {"scores": {MODEL: {NAME: {METRIC: {"value": …, "stderr": …}}}}}. NAME
is that of a task or of a set of prompts; "score_inputs" has a fingerprint of what each was measured
with, since other rows or settings give other scores.

They are here, below the package that measures them, because reports read them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite, nan, sqrt
from typing import Any

from dtrain.core.lazy_import import LazyModule
from dtrain.core.run_dir import BASE_MODEL
from dtrain.monitoring.uncertainty import CERTAIN, paired_standard_error

np: Any = LazyModule("numpy")  # `dtrain check` reads this module without it

SCORES, INPUTS = "scores", "score_inputs"
MAX_BLOCKS = 256  # of rows
MIN_CHANGE = 0.0005  # smaller changes do not show in three decimals


@dataclass(frozen=True)
class Score:
    """A metric of a model, in the metric's own unit.

    Attributes:
        value: NaN if it could not be computed.
        stderr: standard error of the value; None if it is not known.
        higher_is_better: direction of the metric.
        blocks: summed values of blocks of rows [B], if the value is their mean over rows.
        items: number of rows in each block [B]. With both, the uncertainty of a change is that of
            pairs of rows, which is smaller than that of two independent samples.
    """

    value: float
    stderr: float | None = None
    higher_is_better: bool = True
    blocks: tuple[float, ...] = ()
    items: tuple[float, ...] = ()

    @classmethod
    def parse(cls, content: Any) -> Score | None:
        """A score of evaluation.json; None if it has no value."""
        if not isinstance(content, dict) or not isinstance(content.get("value"), int | float):
            return None
        return cls.read(content)

    @classmethod
    def read(cls, content: dict[str, Any]) -> Score:
        """The score that `dump` wrote."""
        return cls(
            value=content["value"],
            stderr=content.get("stderr"),
            higher_is_better=content.get("higher_is_better", True),
            blocks=tuple(content.get("blocks") or ()),
            items=tuple(content.get("items") or ()),
        )

    def dump(self) -> dict[str, Any]:
        """The score as evaluation.json has it."""
        content: dict[str, Any] = {"value": self.value, "stderr": self.stderr}
        if not self.higher_is_better:
            content["higher_is_better"] = False
        if self.blocks:
            content |= {"blocks": list(self.blocks), "items": list(self.items)}
        return content

    def stderr_of_change(self, before: Score) -> float | None:
        """Standard error of this value minus that of another model on the same rows."""
        if self.blocks and self.items == before.items:
            return paired_standard_error(before.blocks, self.blocks, self.items)
        if self.stderr is None or before.stderr is None:
            return None
        return hypot(self.stderr, before.stderr)

    def rating(self, before: Score) -> str:
        """Rate the change as "better", "worse", "same" or "noise"."""
        change, error = self.value - before.value, self.stderr_of_change(before)
        if not isfinite(change) or abs(change) < MIN_CHANGE:
            return "same"
        if error is not None and abs(change) < CERTAIN * error:
            return "noise"
        return "better" if (change > 0) == self.higher_is_better else "worse"

    def text(self) -> str:
        """The value with its standard error."""
        return f"{self.value:.3f}" + ("" if self.stderr is None else f" ± {self.stderr:.3f}")

    def change_text(self, before: Score) -> str:
        """The change with its standard error."""
        error = self.stderr_of_change(before)
        return f"{self.value - before.value:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def mean_score(values: Sequence[float | None]) -> Score:
    """The mean of a metric over rows; None for a row without a value."""
    count = min(len(values), MAX_BLOCKS)
    blocks, items = np.zeros(count), np.zeros(count)
    for index, value in enumerate(values):
        if value is not None:
            blocks[index % count] += value
            items[index % count] += 1
    measured = np.array([value for value in values if value is not None])
    size = len(measured)
    error = float(measured.std(ddof=1)) / sqrt(size) if size > 1 else None
    mean = float(measured.mean()) if size else nan
    return Score(mean, error, blocks=tuple(blocks.tolist()), items=tuple(items.tolist()))


Metrics = Mapping[str, Score]


def put_scores(
    evaluation: dict[str, Any], model: str, name: str, metrics: Metrics, inputs: str
) -> None:
    """Add what a model scored to the content of evaluation.json.

    Args:
        name: of a task or of a set of prompts.
        inputs: fingerprint of its rows and settings. Scores of other models with other inputs
            cannot be compared: they are removed.
    """
    known = evaluation.setdefault(INPUTS, {})
    if known.get(name, inputs) != inputs:
        remove_scores(evaluation, name)
    known[name] = inputs
    by_name = evaluation.setdefault(SCORES, {}).setdefault(model, {})
    by_name[name] = {metric: score.dump() for metric, score in metrics.items()}


def remove_scores(evaluation: dict[str, Any], name: str) -> None:
    """Remove the scores of all models on a task or set."""
    evaluation.get(INPUTS, {}).pop(name, None)
    for by_name in evaluation.get(SCORES, {}).values():
        by_name.pop(name, None)


def adopt_scores(
    evaluation: dict[str, Any],
    other: Mapping[str, Any],
    models: Collection[str],
    inputs: Mapping[str, str],
) -> None:
    """Take over what another evaluation.json has of some models with the same inputs.

    Args:
        inputs: fingerprint of each task or set, by its name.
    """
    same = [n for n, known in (other.get(INPUTS) or {}).items() if inputs.get(n) == known]
    for model, by_name in (other.get(SCORES) or {}).items():
        kept = {name: by_name[name] for name in same if name in by_name}
        if model in models and kept:
            evaluation.setdefault(SCORES, {})[model] = kept
            evaluation.setdefault(INPUTS, {}).update({name: inputs[name] for name in kept})


def get_score(evaluation: Mapping[str, Any], model: str, name: str, metric: str) -> Score | None:
    """A model's score; None if it was not measured."""
    by_name = (evaluation.get(SCORES) or {}).get(model) or {}
    return Score.parse((by_name.get(name) or {}).get(metric))


def metrics_of(evaluation: Mapping[str, Any], name: str) -> list[str]:
    """The metrics of a task or set, in the order in which they were measured; the first counts."""
    by_model = (evaluation.get(SCORES) or {}).values()
    return list(dict.fromkeys(metric for names in by_model for metric in names.get(name) or {}))


@dataclass(frozen=True)
class ScoreRow:
    """One metric of a task or set, over all models.

    Attributes:
        models: all measured models of the run, "base" first.
        scores: by model, in the same order; None where it was not measured.
    """

    name: str
    metric: str
    models: Sequence[str]
    scores: Sequence[Score | None]

    @property
    def title(self) -> str:
        """Name and metric, as a gate names them."""
        return f"{self.name} {self.metric}"

    @property
    def base(self) -> Score | None:
        """The base model's score."""
        return self.scores[0] if self.models[:1] == [BASE_MODEL] else None

    @property
    def last(self) -> Score | None:
        """The score of the last model that was measured."""
        return next((score for score in reversed(self.scores) if score is not None), None)

    def change(self, score: Score | None) -> tuple[str, str] | None:
        """Text and rating of a score's change from the base; None if there is none."""
        if score is None or self.base is None or score is self.base:
            return None
        return score.change_text(self.base), score.rating(self.base)


def score_rows(evaluation: Mapping[str, Any]) -> Iterator[ScoreRow]:
    """A row for each metric of each task and set, in the order of evaluation.json."""
    by_model: dict[str, Any] = evaluation.get(SCORES) or {}
    models = [str(m) for m in evaluation.get("models") or []]
    models += [model for model in by_model if model not in models]
    for name in dict.fromkeys(name for names in by_model.values() for name in names):
        for metric in metrics_of(evaluation, name):
            scores = [get_score(evaluation, model, name, metric) for model in models]
            yield ScoreRow(name, metric, models, scores)
