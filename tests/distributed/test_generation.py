"""Answers to prompts are the same on any number of ranks and under every engine."""

from __future__ import annotations

import json

import pytest

from dtrain.core.errors import Exit

SHORT = [
    "stages.domain.train.steps=4",
    "stages.domain.train.learning_rate=0.03",
    "stages.domain.train.evaluate_every_steps=null",
    "stages.domain.train.evaluate_on=null",
    "stages.task.train.steps=1",
    "stages.task.train.evaluate_every_steps=null",
    "stages.task.train.evaluate_on=null",
    "stages.task.train.checkpoint_every_steps=null",
    "evaluation.sets={}",
]
ROWS = "path: 'dtrain:tiny-text/questions.jsonl', columns: {prompt: question, completion: answer}"
# 5 prompts in batches of 2: the ranks have different numbers of batches, and of tokens
GREEDY = f"{{{ROWS}, limit: 5, batch_size: 2, max_new_tokens: 9, metrics: [f1, chrf]}}"
SAMPLED = f"{{{ROWS}, limit: 3, max_new_tokens: 5, temperature: 1.0, top_p: 0.9}}"
# pow refuses texts: a function of the user that raises
RAISES = f"{{{ROWS}, limit: 1, max_new_tokens: 2, metrics: [function], function: 'builtins:pow'}}"
SETS = f"evaluation.generation={{a: {GREEDY}, b: {SAMPLED}, c: {RAISES}}}"
MODELS = ("base", "domain", "task")


def predictions(run, model: str) -> str:
    return (run.folder / "predictions" / f"{model}.jsonl").read_text()


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    """What one rank answered, by model, for the tests that follow."""
    return {}


def test_answers_and_scores_of_one_rank(start_ranks, known):
    run = start_ranks(SETS, *SHORT, ranks=1).wait(0)
    known |= {model: predictions(run, model) for model in MODELS}
    assert len(set(known.values())) == len(MODELS)
    lines = [json.loads(line) for line in known["task"].splitlines()]
    assert [line["set"] for line in lines] == ["a"] * 5 + ["b"] * 3 + ["c"]
    scores = run.json("evaluation.json")["scores"]
    for model in MODELS:
        rows = [json.loads(line)["scores"] for line in known[model].splitlines()][:5]
        mean = sum(row["f1"] for row in rows) / 5
        assert scores[model]["a"]["f1"]["value"] == pytest.approx(mean)
        assert scores[model]["a"]["chrf"]["stderr"] > 0 and scores[model]["c"] == {}
    assert "no score of function: builtins:pow failed for 1 of 1 answers" in run.output
    assert "TypeError" in run.output and "Traceback" not in run.output


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_answer_as_one(engine, start_ranks, known):
    assert known, "run the whole file"
    run = start_ranks(SETS, *SHORT, f"engine.kind={engine}").wait(0)
    for model in MODELS:
        assert predictions(run, model) == known[model], model


def test_a_judge_that_is_down_is_told_before_the_first_step(start_ranks):
    judge = "{endpoint: 'http://127.0.0.1:9/v1', model: m}"
    asked = f"evaluation.generation={{a: {{{ROWS}, limit: 1, metrics: [judge], judge: {judge}}}}}"
    failed = start_ranks(asked, *SHORT, ranks=1).wait(Exit.USER_ERROR)
    assert "the judge at http://127.0.0.1:9/v1 cannot be used" in failed.output
    assert "Traceback" not in failed.output and not (failed.folder / "domain").exists()
