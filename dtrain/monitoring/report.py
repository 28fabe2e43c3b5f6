"""A run's report as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined, Undefined

from dtrain.config.methods import TRAITS
from dtrain.config.objectives import OBJECTIVES
from dtrain.core.files import write_atomic
from dtrain.core.lazy_import import LazyModule
from dtrain.core.run_dir import RunDir
from dtrain.core.units import count, duration, size
from dtrain.monitoring.alerts import find_alerts
from dtrain.monitoring.run_record import RunRecord, format_loss, rate_change, read_run

# Only the rank that writes the report needs matplotlib.
plots: Any = LazyModule("dtrain.monitoring.plots")

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MAX_SKIPPED = 20  # skipped steps that are listed

MetricLines = list[dict[str, Any]]


def write_report(run: Path) -> Path:
    """Write report.html into the run folder, as far as the run has come.

    The file has no external resources, and all text in it is escaped.
    """
    path = RunDir(run).html_report
    write_atomic(path, render_report(read_run(run)))
    return path


def render_report(record: RunRecord) -> str:
    """The report as HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"loss": format_loss, "rating": rate_change, "short": _short_hash}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    finished, progress = _progress(record)
    return template.render(
        record=record,
        finished=finished,
        progress=progress,
        headline=_headline(record),
        chain=_chain(record, finished),
        stages=[_stage(record, n) for n in dict.fromkeys([*record.metrics, *record.artifacts])],
    )


def _short_hash(identity: object) -> str:
    """The first twelve digits of a fingerprint."""
    return "—" if identity is None or isinstance(identity, Undefined) else str(identity)[:12]


def _progress(record: RunRecord) -> tuple[bool, str]:
    """Whether the run has finished, and its progress in words."""
    names = [str(stage["name"]) for stage in record.stages]
    done = [name for name in names if name in record.artifacts]
    if names and len(done) == len(names):
        return True, "finished"
    if record.metrics or done:
        return False, f"{len(done)} of {len(names) or '?'} stages finished"
    return False, "not started"


def _headline(record: RunRecord) -> str:
    base = (record.recipe.get("model") or {}).get("base", "unknown base model")
    engine = (record.recipe.get("engine") or {}).get("kind")
    seconds = sum(a.get("seconds") or 0 for a in record.artifacts.values())
    texts = [
        str(base),
        f"{len(record.stages)} stages" if record.stages else "",
        f"engine {engine}" if engine else "",
        f"{duration(seconds)} of training" if seconds else "",
    ]
    return " · ".join(text for text in texts if text)


def _chain(record: RunRecord, finished: bool) -> list[dict[str, Any]]:
    """The boxes of the chain: base model, each stage, merged model."""
    base = str((record.recipe.get("model") or {}).get("base", "base"))
    base_name = base.split("/")[-1].removeprefix("dtrain:")
    boxes = [_box("model", base_name, ["base model"], done=True)]
    for stage in record.stages:
        name = str(stage["name"])
        kind = str(stage.get("kind", ""))
        lines = [OBJECTIVES[kind].title if kind in OBJECTIVES else kind]
        lines.append(_method_text(stage.get("method") or {}))
        step = "merge" if len(boxes) > 1 else ""
        boxes.append(_box("stage", name, lines, done=name in record.artifacts, step=step))
    if record.stages and (record.recipe.get("output") or {}).get("merge", True):
        done = finished and record.merged is not None
        lines = [record.merged or ""]
        boxes.append(_box("model", "merged model", lines, done=done, step="merge"))
    return boxes


def _box(kind: str, title: str, lines: list[str], *, done: bool, step: str = "") -> dict[str, Any]:
    """A box of the chain; `step` is what leads to it from the box before."""
    shown = [line for line in lines if line]
    return {"kind": kind, "title": title, "lines": shown, "done": done, "step": step}


def _method_text(method: dict[str, Any]) -> str:
    kind = str(method.get("kind", ""))
    title = TRAITS[kind].title if kind in TRAITS else kind
    return f"{title}, r = {method['r']}" if method.get("r") else title


def _stage(record: RunRecord, name: str) -> dict[str, Any]:
    lines = record.metrics.get(name, [])
    return {
        "name": name,
        "facts": _facts(record.artifacts.get(name, {}), lines),
        "plot": plots.plot_stage(lines),
        "sources": _source_rows(lines),
        "alerts": find_alerts(lines),
        "skipped": [line for line in lines if "skipped" in line][:MAX_SKIPPED],
    }


def _facts(artifact: dict[str, Any], lines: MetricLines) -> list[tuple[str, str]]:
    """Figures of a stage by name: from the lineage if it has them, else from the metrics."""
    steps = artifact.get("steps") or max((line["step"] for line in lines), default=0)
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    speed = artifact.get("tokens_per_second") or (median(speeds) if speeds else None)
    memory = artifact.get("peak_memory_bytes") or max(
        (line.get("peak_memory_bytes") or 0 for line in lines), default=0
    )
    trained, total = artifact.get("trainable_parameters"), artifact.get("total_parameters")
    share = ""
    if trained and total:
        share = f"{count(trained)} of {count(total)} parameters ({100 * trained / total:.2g} %)"
    facts = [
        ("steps", str(steps)),
        ("tokens", count(sum(line.get("tokens") or 0 for line in lines))),
        ("time", duration(artifact["seconds"]) if artifact.get("seconds") else ""),
        ("tokens/s", f"{speed:.0f}" if speed else ""),
        ("peak memory", size(memory) if memory else ""),
        ("trained", share),
    ]
    return [(name, value) for name, value in facts if value]


def _source_rows(lines: MetricLines) -> list[dict[str, Any]]:
    """A table row for each of several sources.

    Losses are means over the target tokens of the first and of the last tenth of the steps.
    """
    steps = [line["sources"] for line in lines if isinstance(line.get("sources"), dict)]
    tenth = -(-len(steps) // 10)
    names = dict.fromkeys(name for step in steps for name in step)

    def total(name: str, key: str) -> str:
        return count(sum(step.get(name, {}).get(key) or 0 for step in steps))

    return [
        {
            "name": name,
            "sequences": total(name, "sequences"),
            "tokens": total(name, "tokens"),
            "first_loss": _mean_loss(steps[:tenth], name),
            "last_loss": _mean_loss(steps[-tenth:], name),
        }
        for name in names
    ]


def _mean_loss(steps: MetricLines, name: str) -> float | None:
    measured = [step[name] for step in steps if (step.get(name) or {}).get("loss") is not None]
    targets = sum(source["supervised_tokens"] for source in measured)
    total = sum(source["loss"] * source["supervised_tokens"] for source in measured)
    return total / targets if targets else None
