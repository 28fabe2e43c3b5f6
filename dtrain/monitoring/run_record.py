"""Read a run folder, as far as the run has come, and summarize it for the terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.config.yaml_document import parse_value
from dtrain.core.errors import UserError
from dtrain.core.file_types import check_type
from dtrain.core.files import is_missing, parse_json, read_json_lines, read_text
from dtrain.core.output import printable
from dtrain.core.run_dir import BASE_MODEL, EVALUATION, HTML_REPORT, LINEAGE, RECIPE, RunDir
from dtrain.monitoring.alerts import find_alerts
from dtrain.monitoring.metrics import read_metrics
from dtrain.monitoring.run_files import EvaluationFile, Lineage, Prediction, RecipeValues
from dtrain.monitoring.scores import MIN_CHANGE, ScoreRow, score_rows
from dtrain.monitoring.starts import TimedStart, read_starts, timed_starts
from dtrain.monitoring.uncertainty import paired_standard_error

MAX_PROMPTS = 8  # of a set in the report


@dataclass(frozen=True)
class HeldOutLosses:
    """The held-out losses of one evaluation set.

    Attributes:
        name: name of the set.
        values: loss by model ("base", then each stage); None if it was not measured.
        blocks: summed losses of blocks of rows by model, and their `items`; for the uncertainty.
    """

    name: str
    values: dict[str, float | None]
    blocks: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, evaluation: dict[str, Any]) -> HeldOutLosses:
        """The losses of a set in the content of evaluation.json."""
        by_model = (evaluation.get("losses") or {}).get(name) or {}
        models = [str(model) for model in evaluation.get("models") or []]
        values = {model: by_model[model] for model in models if model in by_model}
        return cls(name, values, (evaluation.get("blocks") or {}).get(name) or {})

    def standard_error(self, model: str) -> float | None:
        """Standard error of a model's loss minus the base's; None if it cannot be known."""
        names = BASE_MODEL, model, "items"
        if not {*names} <= self.blocks.keys():
            return None
        return paired_standard_error(*(self.blocks[name] for name in names))

    @property
    def last(self) -> float | None:
        """The loss of the last measured model."""
        measured = [value for value in self.values.values() if value is not None]
        return measured[-1] if measured else None

    @property
    def change(self) -> float | None:
        """The last model's loss minus the base model's; None while only one was measured."""
        return self.difference(list(self.values)[-1]) if self.values else None

    def difference(self, model: str) -> float | None:
        """A model's loss minus the base model's."""
        base, value = self.values.get(BASE_MODEL), self.values.get(model)
        if base is None or value is None or model == BASE_MODEL:
            return None
        return value - base

    @property
    def percent(self) -> float | None:
        """The change in percent of the base model's loss."""
        base = self.values.get(BASE_MODEL)
        return 100 * self.change / base if self.change is not None and base else None


@dataclass(frozen=True)
class PromptAnswers:
    """A prompt, its reference, and the answers to it.

    Attributes:
        name: of the set.
        answers: by model: the text, and its scores by metric.
    """

    name: str
    prompt: str
    reference: str | None
    answers: dict[str, tuple[str, dict[str, float | None]]]


@dataclass
class RunRecord:
    """The contents of a run folder.

    Attributes:
        folder: the run folder.
        recipe_text, recipe: recipe.yaml as text and as values; empty if it is missing.
        lineage, evaluation: contents of the JSON files; empty if they are missing.
        metrics: the lines of each stage's metrics.jsonl, by stage.
        answers: to the first prompts of each set of `evaluation.generation`.
        starts: when and where the ranks were started.
        errors: files that cannot be read, and why.
    """

    folder: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    answers: list[PromptAnswers] = field(default_factory=list)
    starts: list[TimedStart] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run, or of its folder."""
        return str(self.recipe.get("name") or self.lineage.get("name") or self.folder.name)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The recipe's stages."""
        return self.recipe.get("stages") or []

    @property
    def artifacts(self) -> dict[str, dict[str, Any]]:
        """The artifacts of the lineage, by name."""
        return {str(a["name"]): a for a in self.lineage.get("artifacts") or []}

    @property
    def models(self) -> list[str]:
        """Names of the evaluated models, the base model first."""
        return [str(name) for name in self.evaluation.get("models") or []]

    @property
    def losses(self) -> list[HeldOutLosses]:
        """Held-out losses of each evaluation set."""
        return [
            HeldOutLosses.of(name, self.evaluation) for name in self.evaluation.get("losses") or {}
        ]

    @property
    def held_out_metrics(self) -> list[tuple[str, str, dict[str, float | None]]]:
        """Metrics of evaluation sets: name of the set, of the metric, and values by model."""
        rows = []
        for name, by_model in (self.evaluation.get("metrics") or {}).items():
            metrics = dict.fromkeys(key for values in by_model.values() for key in values)
            for metric in metrics:
                values = {m: by_model.get(m, {}).get(metric) for m in self.models}
                rows.append((str(name), metric, values))
        for name, by_model in (self.evaluation.get("sources") or {}).items():
            sources = [source for values in by_model.values() for source in values.items()]
            keys = [(n, key) for n, figures in sources for key in figures if key != "items"]
            for source, key in dict.fromkeys(keys):
                found = {m: by_model.get(m, {}).get(source) or {} for m in self.models}
                values = {model: figures.get(key) for model, figures in found.items()}
                rows.append((str(name), f"{key} of {source}", values))
        return rows

    @property
    def scores(self) -> list[ScoreRow]:
        """Scores on tasks and on sets of prompts."""
        return list(score_rows(self.evaluation))

    @property
    def gpu_hours(self) -> float:
        """Hours of all starts, times their GPUs."""
        return sum(s.seconds * s.start.gpus for s in self.starts) / 3600

    def losses_around(self, stage: str) -> dict[str, tuple[float | None, float | None]]:
        """The held-out losses before and after a stage, by set."""
        if stage not in self.models[1:]:
            return {}
        adapters = {s["name"] for s in self.stages if s.get("adapter_name")}
        earlier = self.models[: self.models.index(stage)]
        if stage in adapters:  # it starts from the model that the others start from
            earlier = [model for model in earlier if model not in adapters]
        before = earlier[-1]
        return {x.name: (x.values.get(before), x.values.get(stage)) for x in self.losses}

    @property
    def merged(self) -> str | None:
        """Path of the last merged model, relative to the run folder."""
        merged = [a["merged"] for a in self.artifacts.values() if a.get("merged")]
        return str(merged[-1]) if merged else None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; files that cannot be read are listed in `errors`."""
    record, run = RunRecord(folder), RunDir(folder)
    record.recipe_text = _read_text(record, RECIPE)
    record.recipe = _parse(record, RECIPE, record.recipe_text, parse_value, RecipeValues)
    for name, kind in ((LINEAGE, Lineage), (EVALUATION, EvaluationFile)):
        content = _parse(record, name, _read_text(record, name), parse_json, kind)
        setattr(record, name.removesuffix(".json"), content)
    names = [str(stage["name"]) for stage in record.stages] or list(record.artifacts)
    for name in names:
        if lines := read_metrics(run.stage(name).metrics):
            record.metrics[name] = lines
    record.answers = _read_answers(run, record.models)
    record.starts = timed_starts(read_starts(run), record.metrics)
    return record


def _read_answers(run: RunDir, models: list[str]) -> list[PromptAnswers]:
    """The answers of all models to the first prompts of each set."""
    found: dict[tuple[str, int], PromptAnswers] = {}
    for model in models:
        counts: Counter[str] = Counter()
        for line in read_json_lines(run.predictions(model), Prediction):
            name = str(line.get("set"))
            counts[name] += 1
            if counts[name] > MAX_PROMPTS:
                continue
            prompt, reference = str(line.get("prompt")), line.get("reference")
            row = found.setdefault((name, counts[name]), PromptAnswers(name, prompt, reference, {}))
            if row.prompt == prompt:  # else the set has changed since
                row.answers[model] = str(line.get("answer")), line.get("scores") or {}
    return list(found.values())


def _parse(record: RunRecord, name: str, text: str, parse: Any, kind: Any) -> dict[str, Any]:
    """The content of a file as values of a type; empty, with the error noted, if it is not."""
    try:
        return check_type(parse(text, name), kind, name) if text.strip() else {}
    except UserError as error:
        reason = f"{error.where.removeprefix(name)} {error.message}".lstrip(": ")
        record.errors.append(f"{name} cannot be read: {reason}")
        return {}


def _read_text(record: RunRecord, name: str) -> str:
    path = record.folder / name
    try:
        return read_text(path)
    except UserError as error:
        if not is_missing(error):
            record.errors.append(f"{name} cannot be read: {error.message}")
        return ""


WIDTH = 100
MAX_PRINTED = 3  # prompts of a set


def run_summary(run: Path) -> str:
    """Held-out losses, answers, and the paths of the results."""
    record = read_run(run)
    answers = [_answer_block(number, answer) for number, answer in _shown_answers(record)]
    results = [("merged model", record.merged), ("report", HTML_REPORT)]
    paths = "\n".join(f"{name:<14} {record.folder / path}" for name, path in results if path)
    tables = _loss_table(record), _metric_table(record), _score_table(record)
    blocks = (*tables, _used_checkpoints(record), *answers, _alerts(record), paths)
    return "\n\n".join(block for block in blocks if block)


def _used_checkpoints(record: RunRecord) -> str:
    """A line for each stage whose best checkpoint was chosen."""
    return "\n".join(
        f"stage {name} is {describe_used(artifact)}"
        for name, artifact in record.artifacts.items()
        if artifact.get("used")
    )


def describe_used(facts: dict[str, Any]) -> str:
    """Which checkpoint is a stage's model, and why.

    Args:
        facts: of the stage, with `used`.
    """
    used, steps = facts["used"], facts["steps"]
    name, value = f"{used['metric']} of {used['set']}", format_loss(used["value"])
    if used["step"] == steps:
        return f"its last step, {steps}: {name} {value} is the best measured"
    last = format_loss(used["last_value"])
    return f"step {used['step']} of {steps}: {name} {value}, after the last step {last}"


def _alerts(record: RunRecord) -> str:
    """A line for each alert of the stages."""
    return "\n".join(
        _wrap("warning: ", f"stage {stage}: {alert}")
        for stage, lines in record.metrics.items()
        for alert in find_alerts(lines)
    )


def format_loss(value: object) -> str:
    """A loss with three decimals, or a dash if it was not measured."""
    return f"{value:.3f}" if isinstance(value, int | float) else "—"


def rate_change(change: float) -> str:
    """Rate the change of a loss as "better", "worse" or "same"."""
    if abs(change) < MIN_CHANGE:
        return "same"
    return "better" if change < 0 else "worse"


def _loss_table(record: RunRecord) -> str:
    """Held-out losses by set and model, with the change from the base model to the last."""
    if not record.losses:
        return "" if record.scores else "No held-out losses were measured."
    columns = [f"after {name}" if i else name for i, name in enumerate(record.models)]
    rows = [["held-out loss", *columns, "change", ""]]
    for losses in record.losses:
        values = [format_loss(losses.values.get(model)) for model in record.models]
        rows.append([losses.name, *values, *_change_cells(losses)])
    return align(rows)


def _metric_table(record: RunRecord) -> str:
    """Other metrics of the sets, such as the accuracy on held-out pairs; empty without any."""
    if not record.held_out_metrics:
        return ""
    columns = [f"after {name}" if i else name for i, name in enumerate(record.models)]
    rows = [["held-out metric", *columns, ""]]
    for name, metric, values in record.held_out_metrics:
        cells = [format_loss(values[model]) for model in record.models]
        rows.append([f"{name} {metric.replace('_', ' ')}", *cells, ""])
    return align(rows)


def _score_table(record: RunRecord) -> str:
    """Scores with their standard errors, and the change from the base to the last model."""
    rows = record.scores
    if not rows:
        return ""
    columns = [f"after {model}" if i else model for i, model in enumerate(rows[0].models)]
    table = [["score", *columns, "change", ""]]
    for row in rows:
        cells = ["—" if score is None else score.text() for score in row.scores]
        table.append([row.title, *cells, *(row.change(row.last) or ("—", ""))])
    return align(table)


def align(rows: list[list[str]]) -> str:
    """Align the columns of a table; the last is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *middle, last = zip(row, widths, strict=True)
        cells = [f"{first[0]:<{first[1]}}", *(f"{cell:>{w}}" for cell, w in middle), last[0]]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def _change_cells(losses: HeldOutLosses) -> tuple[str, str]:
    if losses.change is None or losses.percent is None:
        return "—", ""
    error = losses.standard_error(list(losses.values)[-1])
    spread = "" if error is None else f" ± {error:.3f}"
    return f"{losses.change:+.3f}{spread} ({losses.percent:+.1f} %)", rate_change(losses.change)


def _shown_answers(record: RunRecord) -> Iterator[tuple[int, PromptAnswers]]:
    """The first prompts of each set, numbered."""
    counts: Counter[str] = Counter()
    for row in record.answers:
        counts[row.name] += 1
        if counts[row.name] <= MAX_PRINTED:
            yield counts[row.name], row


def _answer_block(number: int, row: PromptAnswers) -> str:
    """A prompt with its reference and the answer of each model."""
    texts = {"reference": row.reference, **{m: text for m, (text, _) in row.answers.items()}}
    width = max(11, *map(len, texts))
    lines = [_wrap(f"{row.name} {number}. ", row.prompt)]
    lines += [_wrap(f"   {name:<{width}} ", text or "—") for name, text in texts.items()]
    return "\n".join(lines)


def _wrap(label: str, text: str) -> str:
    """Wrap a text under its label; control characters are removed."""
    line = " ".join(printable(text).split())
    return textwrap.fill(line, WIDTH, initial_indent=label, subsequent_indent=" " * len(label))
