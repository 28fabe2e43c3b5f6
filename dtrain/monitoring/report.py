"""The run's report: one HTML file a person likes to look at."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined

from dtrain.core.files import write_atomic
from dtrain.core.lazy_import import LazyModule
from dtrain.core.run_dir import RunDir
from dtrain.core.units import count, duration, size
from dtrain.monitoring.formatting import loss_text, short, tone
from dtrain.monitoring.run_record import Record, read_record
from dtrain.monitoring.source_stats import source_rows
from dtrain.monitoring.summary import summary

__all__ = ["render", "summary", "write_report"]

plots: Any = LazyModule(
    "dtrain.monitoring.plots"
)  # matplotlib: for the rank that draws, at the end

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(run: Path) -> Path:
    """Write report.html into the run folder, from whatever is there of the run yet.

    The file needs nothing beside it and nothing from outside; all text is escaped.
    """
    record = read_record(run)
    path = RunDir(run).html_report
    write_atomic(path, render(record))
    return path


def render(record: Record) -> str:
    """The report as HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"loss": loss_text, "tone": tone, "short": short}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        record=record,
        state=state(record),
        headline=headline(record),
        chain=chain(record),
        stages=stage_views(record),
    )


def state(record: Record) -> dict[str, Any]:
    """How far the run has come, in words."""
    names = [str(stage["name"]) for stage in record.stages]
    done = [name for name in names if name in record.artefacts]
    if names and len(done) == len(names):
        return {"finished": True, "text": "finished"}
    if record.metrics or done:
        return {"finished": False, "text": f"{len(done)} of {len(names) or '?'} stages finished"}
    return {"finished": False, "text": "not begun"}


def headline(record: Record) -> str:
    """One line on what was run."""
    base = (record.recipe.get("model") or {}).get("base", "unknown base model")
    engine = (record.recipe.get("engine") or {}).get("kind")
    seconds = sum(a.get("seconds") or 0 for a in record.artefacts.values())
    parts = [
        str(base),
        f"{len(record.stages)} stages" if record.stages else "",
        f"engine {engine}" if engine else "",
        f"{duration(seconds)} of training" if seconds else "",
    ]
    return " · ".join(part for part in parts if part)


def chain(record: Record) -> list[dict[str, Any]]:
    """The boxes of the picture of the chain: base, each stage, the merged model."""
    base = str((record.recipe.get("model") or {}).get("base", "base"))
    links = [_link("model", base.split("/")[-1].removeprefix("dtrain:"), ["base model"], True, "")]
    merged_before = False
    for stage in record.stages:
        artefact = record.artefacts.get(str(stage["name"]))
        lines = [_kind(stage), _method(stage.get("method") or {})]
        links.append(
            _link(
                "stage",
                str(stage["name"]),
                lines,
                artefact is not None,
                "merge" if merged_before else "",
            )
        )
        merged_before = True
    if record.stages and (record.recipe.get("output") or {}).get("merge", True):
        done = state(record)["finished"] and record.merged is not None
        links.append(_link("model", "merged model", [record.merged or ""], done, "merge"))
    return links


def stage_views(record: Record) -> list[dict[str, Any]]:
    """What the report shows of each stage that has begun: facts, picture, skipped steps."""
    names = dict.fromkeys([*record.metrics, *record.artefacts])
    return [_stage_view(record, name) for name in names]


def _stage_view(record: Record, name: str) -> dict[str, Any]:
    lines = record.metrics.get(name, [])
    return {
        "name": name,
        "facts": _facts(record.artefacts.get(name, {}), lines),
        "picture": plots.curves(lines),
        "sources": source_rows(lines),
        "skipped": [line for line in lines if "skipped" in line][:20],
    }


def _facts(artefact: dict[str, Any], lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and value of what is known of a stage: as the lineage says, else from its metrics."""
    steps = artefact.get("steps") or max((line["step"] for line in lines), default=0)
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    speed = artefact.get("tokens_per_second") or (median(speeds) if speeds else None)
    memory = artefact.get("peak_memory_bytes") or max(
        (line.get("peak_memory_bytes") or 0 for line in lines), default=0
    )
    trained, total = artefact.get("trainable_parameters"), artefact.get("total_parameters")
    facts = [
        ("steps", str(steps)),
        ("tokens", count(sum(line.get("tokens") or 0 for line in lines))),
        ("time", duration(artefact["seconds"]) if artefact.get("seconds") else ""),
        ("tokens/s", f"{speed:.0f}" if speed else ""),
        ("peak memory", size(memory) if memory else ""),
        (
            "trained",
            f"{count(trained)} of {count(total)} parameters ({100 * trained / total:.2g} %)"
            if trained and total
            else "",
        ),
    ]
    return [(name, value) for name, value in facts if value]


def _link(kind: str, title: str, lines: list[str], done: bool, how: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "title": title,
        "lines": [line for line in lines if line],
        "done": done,
        "how": how,
    }


def _kind(stage: dict[str, Any]) -> str:
    names = {"cpt": "continued pretraining", "sft": "supervised fine-tuning"}
    return names.get(str(stage.get("kind")), str(stage.get("kind", "")))


def _method(method: dict[str, Any]) -> str:
    names = {"lora": "LoRA", "qlora": "QLoRA", "full": "every parameter"}
    text = names.get(str(method.get("kind")), str(method.get("kind", "")))
    return f"{text}, r = {method['r']}" if method.get("r") else text
