"""The whole time of a stage and of the chain, and what it costs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dtrain.cli.root import app
from dtrain.config.load import load_recipe
from dtrain.planning.gpus import find_gpu
from dtrain.planning.plan import RecipePlan, make_plan
from dtrain.planning.render import render_plan
from dtrain.planning.workload import Cluster

TOKENS = [
    "stages.domain.train={global_batch_size: 64, tokens: 1000000000}",
    "stages.task.train={global_batch_size: 32, steps: 3000}",
]


def plan_of(*overrides: str, name: str = "7b-lora") -> RecipePlan:
    recipe = load_recipe(name, [*TOKENS, *overrides])
    return make_plan(recipe, Cluster(find_gpu("h100-80g"), 1, 8))


@pytest.fixture
def held_out(tmp_path) -> str:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "%s"}\n' % ("word " * 2_000_000))
    source = f"{{path: {rows}, format: text}}"
    return f"evaluation.sets={{held: {{kind: cpt, sequence_length: 2048, sources: [{source}]}}}}"


def test_a_run_takes_as_long_as_its_stages() -> None:
    plan = plan_of()
    assert plan.hours is not None
    totals = [stage.time.total for stage in plan.stages]
    assert plan.hours.middle == pytest.approx(sum(total.middle for total in totals))
    for stage, total in zip(plan.stages, totals, strict=True):
        assert total.low > stage.time.training.low and total.high > stage.time.training.high
    first, second = (stage.time for stage in plan.stages)
    assert first.load > second.load > 0 and first.merge > 0
    assert plan.gpu_hours.middle == pytest.approx(8 * plan.hours.middle)


def test_evaluation_saves_and_merge_take_time(held_out) -> None:
    task = "stages.task.train={global_batch_size: 32, steps: 3000, %s}"
    once = plan_of(held_out).stages[1].time
    often = plan_of(held_out, task % "evaluate_every_steps: 100").stages[1].time
    assert often.evaluation == pytest.approx(31 * once.evaluation) and once.evaluation > 0
    saved = plan_of(held_out, task % "checkpoint_every_steps: 10").stages[1].time
    assert saved.saves > once.saves
    assert plan_of("output.merge=false").stages[1].time.merge == 0
    base_and_stage = plan_of(held_out).stages[0].time
    assert base_and_stage.evaluation == pytest.approx(2 * once.evaluation, rel=0.05)


def test_the_price_gives_the_cost_as_text_and_json() -> None:
    arguments = ["plan", "7b-lora", *TOKENS, "--price", "2.5"]
    text = CliRunner().invoke(app, arguments).output
    cost = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["cost"]
    assert cost["middle"] == pytest.approx(2.5 * plan_of().gpu_hours.middle)
    assert f"cost           {cost['middle']:,.2f} (" in text and "at 2.5 per GPU-hour" in text
    assert "whole run" in text


def test_what_is_not_known_or_not_timed_is_said() -> None:
    unknown = make_plan(load_recipe("7b-lora"), Cluster(find_gpu("h100-80g"), 1, 8))
    text = "\n".join(render_plan(unknown, 100, 2.5))
    assert unknown.hours is None and "cost  " not in text
    assert "not known: the data of domain and task are not on this machine" in text
    prompts = "evaluation.generation={ask: {path: nowhere.jsonl}}"
    text = "\n".join(render_plan(plan_of(prompts), 100))
    assert "not in it      answers to prompts" in text
