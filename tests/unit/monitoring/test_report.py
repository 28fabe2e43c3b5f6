"""Report and summary of finished runs, unfinished runs, and runs with hostile names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dtrain.monitoring.metrics import Metrics
from dtrain.monitoring.report import write_report
from dtrain.monitoring.run_record import rate_change, run_summary

RECIPE = """\
name: {name}
model: {{base: "dtrain:tiny-llama"}}
engine: {{kind: fsdp2}}
stages:
  - {{name: domain, kind: cpt, method: {{kind: lora, r: 8}}}}
  - {{name: task, kind: sft, method: {{kind: qlora, r: 4}}}}
output: {{folder: runs/x, merge: true}}
"""
EVIL = "<script>alert(1)</script>"


class _Tags(HTMLParser):
    """Tags with their attributes, and the tags that were not closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _write(run: Path, name: str, value: Any) -> None:
    run.mkdir(exist_ok=True)
    (run / name).write_text(value if isinstance(value, str) else json.dumps(value))


def _artifact(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "stage",
        "identity": "ab" * 32,
        "made_from": {"parent": "cd" * 32, "data": "ef" * 32, "settings": "01" * 32},
        "steps": 10,
        "seconds": 75.0,
        "trainable_parameters": 1_000,
        "total_parameters": 100_000,
        "peak_memory_bytes": 2_000_000_000,
        "tokens_per_second": 120.0,
        "adapter": f"{name}/adapter",
        "merged": f"{name}/merged",
    }


def _write_answer(folder: Path, model: str, text: str, **more: str) -> None:
    line = {"set": "ask", "prompt": "What is it?", "reference": "A box.", **more}
    line |= {"answer": text, "scores": {"f1": 0.5}}
    (folder / "predictions").mkdir(exist_ok=True)
    _write(folder, f"predictions/{model}.jsonl", json.dumps(line))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two stages."""
    folder = tmp_path / "run"
    _write(folder, "recipe.yaml", RECIPE.format(name="toy"))
    _write(
        folder,
        "lineage.json",
        {"name": "toy", "artifacts": [_artifact("domain"), _artifact("task")]},
    )
    _write(
        folder,
        "evaluation.json",
        {
            "models": ["base", "domain", "task"],
            "losses": {
                "domain": {"base": 3.0, "domain": 2.5, "task": 2.6},
                "general": {"base": 2.0, "domain": 2.1, "task": 2.2},
            },
        },
    )
    for model, text in (("base", "Dunno.\n\nReally."), ("task", "A box.")):
        _write_answer(folder, model, text)
    for stage in ("domain", "task"):
        metrics = Metrics(folder / stage / "metrics.jsonl", resume_at=0)
        for step in range(1, 6):
            metrics.write({"step": step, "loss": 3.0 / step, "tokens": 100, "learning_rate": 1e-4})
    return folder


def test_report_of_a_finished_run(run: Path) -> None:
    text = write_report(run).read_text()
    tags = _Tags(text)
    assert tags.open == []
    assert "finished" in text and "dtrain:tiny-llama" in text and "engine fsdp2" in text
    assert "-0.400 (-13.3 %)" in text and "+0.200 (+10.0 %)" in text
    assert "abababababab" in text and "task/merged" in text
    assert "QLoRA, r = 4" in text and "continued pretraining" in text
    assert [t for t, _ in tags.tags].count("img") == 2
    assert "1k of 100k parameters (1 %)" in text


def test_report_has_no_external_resources(run: Path) -> None:
    text = write_report(run).read_text()
    for tag, attributes in _Tags(text).tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text


def test_all_text_is_escaped(run: Path) -> None:
    _write(run, "recipe.yaml", RECIPE.format(name=f"'{EVIL}'") + f"# {EVIL}\n")
    evaluation = json.loads((run / "evaluation.json").read_text())
    _write_answer(run, "base", EVIL, prompt=EVIL, reference=EVIL, set=EVIL)
    evaluation["losses"][EVIL] = {"base": 1.0, "task": 2.0}
    _write(run, "evaluation.json", evaluation)
    bad = _artifact("task") | {"identity": EVIL, "merged": EVIL, "kind": EVIL}
    _write(run, "lineage.json", {"name": EVIL, "artifacts": [bad]})
    Metrics(run / "task" / "metrics.jsonl", resume_at=9).write(
        {"step": 6, "skipped": EVIL, "documents": [EVIL]}
    )
    assert "<script" not in write_report(run).read_text()


@pytest.mark.parametrize(
    "missing", ["recipe.yaml", "lineage.json", "evaluation.json", "domain/metrics.jsonl"]
)
def test_any_file_can_be_missing(run: Path, missing: str) -> None:
    (run / missing).unlink()
    assert _Tags(write_report(run).read_text()).open == []
    assert run_summary(run)


@pytest.mark.parametrize("broken", ["recipe.yaml", "lineage.json", "evaluation.json"])
def test_a_corrupt_file_is_named(run: Path, broken: str) -> None:
    _write(run, broken, "{ [")
    assert f"{broken} cannot be read" in write_report(run).read_text()


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text()
    assert "not started" in text and tmp_path.name in text


def test_report_of_an_unfinished_run(run: Path) -> None:
    _write(run, "lineage.json", {"name": "toy", "artifacts": [_artifact("domain")]})
    _write(
        run,
        "evaluation.json",
        {"models": ["base", "domain"], "losses": {"domain": {"base": 3.0, "domain": 2.5}}},
    )
    text = write_report(run).read_text()
    assert "1 of 2 stages finished" in text
    assert len(re.findall(r'class="link [a-z]+ waiting"', text)) == 2
    only_base = {"models": ["base"], "losses": {"domain": {"base": 3.0}}}
    _write(run, "evaluation.json", only_base)
    assert _Tags(write_report(run).read_text()).open == []
    assert "3.000" in run_summary(run)


def test_a_missing_loss_is_a_dash(run: Path) -> None:
    _write(
        run,
        "evaluation.json",
        {"models": ["base", "task"], "losses": {"domain": {"base": 3.0, "task": None}}},
    )
    assert "—" in write_report(run).read_text()
    assert "—" in run_summary(run)


def test_skipped_steps_are_listed(run: Path) -> None:
    metrics = Metrics(run / "task" / "metrics.jsonl", resume_at=9)
    metrics.write(
        {"step": 6, "skipped": "non-finite loss", "documents": [f"a:{i}" for i in range(6)]}
    )
    text = write_report(run).read_text()
    assert (
        "Step 6 was skipped: non-finite loss, in the batch of a:0, a:1, a:2, a:3 and 2 more."
        in text
    )


def test_summary_of_a_finished_run(run: Path) -> None:
    assert (
        run_summary(run)
        == f"""\
held-out loss    base   after domain   after task             change
domain          3.000          2.500        2.600   -0.400 (-13.3 %)   better
general         2.000          2.100        2.200   +0.200 (+10.0 %)   worse

ask 1. What is it?
   reference   A box.
   base        Dunno. Really.
   task        A box.

merged model   {run}/task/merged
report         {run}/report.html"""
    )


def test_held_out_metrics_have_a_table_of_their_own(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["metrics"] = {
        "pairs": {
            "base": {"likelier": 0.5, "reward_margin": 0.0},
            "task": {"likelier": 0.875, "reward_margin": None},
        }
    }
    _write(run, "evaluation.json", evaluation)
    assert """\
held-out metric        base   after domain   after task
pairs likelier        0.500              —        0.875
pairs reward margin   0.000              —            —
""" in run_summary(run)
    text = write_report(run).read_text()
    assert "Held-out metrics" in text and "reward margin" in text and "0.875" in text


def test_control_characters_are_removed_from_answers(run: Path) -> None:
    _write_answer(run, "task", "\x1b[2Jgone\x07")
    assert "\x1b" not in run_summary(run) and "\x07" not in run_summary(run)


def test_invisible_changes_are_rated_the_same() -> None:
    assert [rate_change(x) for x in (-0.1, -0.0001, 0.0, 0.1)] == [
        "better",
        "same",
        "same",
        "worse",
    ]


def test_alerts_are_in_the_report_and_the_summary(run: Path) -> None:
    metrics = Metrics(run / "task" / "metrics.jsonl", resume_at=0)
    for step in range(1, 101):
        metrics.write({"step": step, "loss": 2.0 + abs(step - 30) / 20, "tokens": 100})
    for text in (write_report(run).read_text(), " ".join(run_summary(run).split())):
        assert "divergence" in text and "2.250 at best" in text
    assert "warning: stage task: divergence at step 100" in run_summary(run)
