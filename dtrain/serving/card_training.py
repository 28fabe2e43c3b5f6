"""What a model card says of the training: stages, sources, settings, results, environment."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from ruamel.yaml import YAML

from dtrain.config.data import Source
from dtrain.config.objectives import OBJECTIVES
from dtrain.config.schema import Stage
from dtrain.core.addresses import without_folders
from dtrain.core.run_dir import BASE_MODEL
from dtrain.core.units import count, duration
from dtrain.monitoring.run_record import RunRecord, format_loss

UNKNOWN = "—"
HIDDEN_SETTINGS = {"name", "kind", "adapter_name"}


def stage_row(stage: Stage, record: RunRecord) -> dict[str, Any]:
    """What a stage was trained with and on, each figure as a text; UNKNOWN if not recorded."""
    facts = record.artifacts.get(stage.name, {})
    trained, total = facts.get("trainable_parameters"), facts.get("total_parameters")
    rank = f", r = {stage.method.rank}" if stage.method.rank else ""
    share = f"{count(trained)} of {count(total)}" if trained and total else UNKNOWN
    return {
        "name": stage.name,
        "objective": OBJECTIVES[stage.kind].title,
        "method": f"{stage.method.traits.title}{rank}",
        "steps": facts.get("steps", UNKNOWN),
        "tokens": _count(facts.get("tokens")),
        "supervised_tokens": _count(facts.get("supervised_tokens")),
        "batch": f"{stage.train.global_batch_size} x {stage.data.sequence_length} tokens",
        "learning_rate": f"{stage.train.learning_rate:g}",
        "parameters": share,
        "sources": list(_source_rows(stage, facts.get("sources") or [])),
    }


def _count(number: object) -> str:
    return count(number) if isinstance(number, int | float) else UNKNOWN


def _source_rows(stage: Stage, counts: Sequence[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """A row for each source; without counts for stages that an older dtrain trained."""
    for index, source in enumerate(stage.data.all_sources):
        known = counts[index] if index < len(counts) else {}
        yield {
            "path": without_folders(source.path),
            "format": source.format,
            "weight": _weight(source, stage),
            "documents": _count(known.get("documents")),
            "tokens": _count(known.get("tokens")),
        }


def _weight(source: Source, stage: Stage) -> str:
    if stage.data.replay is source:
        return f"replay, {stage.data.replay.ratio:g}"
    weight = source.weight
    return UNKNOWN if weight is None else f"{weight:g}" if isinstance(weight, float) else "changes"


def settings_text(stages: Sequence[Stage]) -> str:
    """The settings of the stages that differ from their defaults, as YAML."""
    yaml, stream = YAML(typ="rt", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.width = False, 2**20
    content = {}
    for stage in stages:
        settings = stage.model_dump(mode="json", exclude_defaults=True, exclude=HIDDEN_SETTINGS)
        settings["method"] = {"kind": stage.method.kind, **settings.get("method", {})}
        for group in (settings.get("data") or {}, settings):
            group.pop("sources", None)
            group.pop("replay", None)
        content[stage.name] = without_folders(settings)
    yaml.dump(content, stream)
    return stream.getvalue()


def held_out_table(record: RunRecord, stages: Sequence[Stage]) -> list[list[str]]:
    """Held-out losses, metrics and scores from the base to the last stage, with a head; or empty.

    The change has its standard error where one is known.
    """
    names = [stage.name for stage in stages]
    models = [model for model in record.models if model == BASE_MODEL or model in names]
    if not names or names[-1] not in models:
        return []
    last, rows = names[-1], [["", *models, "change"]]
    for losses in record.losses:
        change, error = losses.difference(last), losses.standard_error(last)
        spread = "" if error is None else f" ± {error:.3f}"
        cell = UNKNOWN if change is None else f"{change:+.3f}{spread}"
        rows.append(
            [f"{losses.name} loss", *(format_loss(losses.values.get(m)) for m in models), cell]
        )
    for name, metric, values in record.held_out_metrics:
        cells = [format_loss(values.get(model)) for model in models]
        rows.append([f"{name} {metric.replace('_', ' ')}", *cells, UNKNOWN])
    for row in record.scores:
        by_model = dict(zip(row.models, row.scores, strict=True))
        scores = [by_model.get(model) for model in models]
        change_of_score = row.change(by_model.get(last))
        texts = [UNKNOWN if score is None else score.text() for score in scores]
        rows.append([row.title, *texts, change_of_score[0] if change_of_score else UNKNOWN])
    return rows if len(rows) > 1 else []


def environment_text(record: RunRecord, stages: Sequence[Stage]) -> str:
    """What trained the stages; empty if it is not recorded."""
    if not record.starts:
        return ""
    start = record.starts[-1].start
    versions = ", ".join(f"{name} {version}" for name, version in start.versions.items())
    facts = [record.artifacts.get(stage.name, {}) for stage in stages]
    seconds = sum(fact.get("seconds") or 0 for fact in facts)
    engines = dict.fromkeys(str(fact["engine"]) for fact in facts if fact.get("engine"))
    where = f"{start.gpus} x {start.device}" if start.gpus else f"{start.ranks} processes on a CPU"
    texts = [where, ", ".join(engines), duration(seconds) if seconds else "", versions]
    return "dtrain on " + "; ".join(text for text in texts if text)
