"""Metrics of generated answers: equal to the libraries' own numbers, and robust to bad input."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import sacrebleu
from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer
from rouge_score.rouge_scorer import RougeScorer

from dtrain.config.generation import GenerationSet
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.data.conversations import Conversation
from dtrain.evaluation.metric import (
    MetricFailure,
    MetricResult,
    PromptRow,
    build_metrics,
    check_metrics,
)
from dtrain.evaluation.rule_metrics import find_calls
from tests.unit.chat_server import Server

WORDS = ["The", "a", "An", "hen", "fox", "walks,", "sleeps!", "red", "don't", "3.5", "über", "—"]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """100 answers and references that share some words; none of them is empty."""
    draw = random.Random(3)
    texts = []
    for _ in range(100):
        reference = ["hen", *draw.choices(WORDS, k=draw.randint(2, 12))]
        answer = [w for w in reference if draw.random() < 0.7] or ["fox"]
        answer += draw.choices(WORDS, k=draw.randint(0, 4))
        texts.append((" ".join(answer), " ".join(reference)))
    return [("The hen.", "a Hen"), *texts[1:]]


def row(reference: str | dict[str, Any] = "", number: int = 0, **columns: Any) -> PromptRow:
    message = (
        {"role": "assistant", "content": reference} if isinstance(reference, str) else reference
    )
    prompt = Conversation([{"role": "user", "content": f"question {number}"}])
    return PromptRow(prompt, message if message["content"] or message.get("tool_calls") else None,
                     columns, f"a.jsonl:{number}")  # fmt: skip


def measure(kind: str, pairs: list[tuple[str, str]], run: Path, **settings: Any) -> MetricResult:
    chosen = GenerationSet(path="a.jsonl", metrics=[kind], **settings)  # type: ignore[list-item]
    (metric,) = build_metrics(chosen, "a").values()
    rows = [row(reference, number) for number, (_, reference) in enumerate(pairs)]
    return metric.measure(rows, [answer for answer, _ in pairs], run)


def test_scores_of_words_are_those_of_squad(pairs, tmp_path) -> None:
    expected = [float(normalize_answer(a) == normalize_answer(r)) for a, r in pairs]
    result = measure("exact_match", pairs, tmp_path)
    assert [scores["exact_match"] for scores in result.rows] == expected and sum(expected) > 1
    expected = [f1_abstractive([a], [r]) for a, r in pairs]
    result = measure("f1", pairs, tmp_path)
    assert [scores["f1"] for scores in result.rows] == pytest.approx(expected)
    assert result.scores["f1"].value == pytest.approx(mean(expected))


def test_rouge_is_that_of_rouge_score(pairs, tmp_path) -> None:
    names = ["rouge1", "rouge2", "rougeL"]
    scorer, result = RougeScorer(names), measure("rouge", pairs, tmp_path)
    for name in names:
        expected = mean(scorer.score(target=r, prediction=a)[name].fmeasure for a, r in pairs)
        assert result.scores[name].value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "corpus"), [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)]
)
def test_corpus_scores_are_those_of_sacrebleu(kind, corpus, pairs, tmp_path) -> None:
    answers, references = map(list, zip(*pairs, strict=True))
    result = measure(kind, pairs, tmp_path)
    assert result.scores[kind].value == corpus(answers, [references]).score
    error = result.scores[kind].stderr
    assert error is not None and 0.5 < error < 5
    assert error == measure(kind, pairs, tmp_path).scores[kind].stderr  # a fixed seed
    interval = (
        getattr(sacrebleu.metrics, kind.upper())().corpus_score(answers, [references], 1000)._ci
    )
    assert error == pytest.approx(interval / 1.96, rel=0.1)
    assert measure(kind, [("zz", "a b"), ("a red hen sat", "a red hen sat")], tmp_path).rows
    sentence = getattr(sacrebleu, f"sentence_{kind}")(answers[5], [references[5]])
    assert result.rows[5][kind] == sentence.score


def test_standard_error_of_a_mean(tmp_path) -> None:
    score = measure("exact_match", [("a b", "b")] * 3 + [("c", "d")], tmp_path).scores[
        "exact_match"
    ]
    assert (score.value, score.stderr) == (0.75, 0.25)


def test_json_is_valid_by_its_schema(tmp_path) -> None:
    schema = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    answers = ['{"city": "Rome"}', '{"city": 3}', "{}", "Rome", "[" * 100_000]
    pairs = [(answer, "") for answer in answers]
    scores = measure("json_valid", pairs, tmp_path, json_schema=str(tmp_path / "s.json"))
    assert [r["json_valid"] for r in scores.rows] == [1, 0, 0, 0, 0]
    assert [r["json_valid"] for r in measure("json_valid", pairs, tmp_path).rows] == [1, 1, 1, 0, 0]


CALL = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", 1),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"days": 2, "city": "Rome"}}]', 1),
        ('{"name": "weather", "parameters": {"city": "Rome", "days": 2}}', 1),
        (CALL.replace("Rome", "Bonn"), 0),
        (CALL.replace("2", "2.5"), 0),
        (f"{CALL}\n{CALL}", 0),
        ("The weather {is} nice [today].", 0),
    ],
)
def test_tool_call_has_the_name_and_all_arguments(answer, expected) -> None:
    function = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}
    reference = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    settings = GenerationSet(path="a.jsonl", metrics=["tool_call"])
    metric: Any = build_metrics(settings, "a")["tool_call"]
    assert metric.score(row(reference), answer) == {"tool_call": expected}
    assert metric.score(row("no call"), answer) == {
        "tool_call": float(not list(find_calls(answer)))
    }


def test_template_whose_calls_cannot_be_read_is_refused() -> None:
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    reference = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    settings = GenerationSet(path="a.jsonl", metrics=["tool_call"])
    metric = build_metrics(settings, "a")["tool_call"]
    metric.check_row(row(reference), f"<|user|>?<|assistant|>{json.dumps(function)}<|end|>")
    with pytest.raises(UserError, match="cannot read"):
        metric.check_row(row(reference), "<|user|>?<|assistant|>weather(city='Rome')<|end|>")


def test_regex_is_found_anywhere(tmp_path) -> None:
    result = measure("regex", [("about 42 hens", ""), ("many", "")], tmp_path, regex=r"\b\d+\b")
    assert [r["regex"] for r in result.rows] == [1, 0]


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """A module of the current folder."""
    monkeypatch.chdir(tmp_path)
    text = (
        "def length(prediction, reference, row):\n    return len(prediction) - row['limit']\n"
        "def fails(prediction, reference, row):\n    return 1 / len(prediction)\n"
        "def words(prediction, reference, row):\n    return 'good'\n"
        "def two(prediction, reference):\n    return 1\n"
    )
    (tmp_path / "mine_of_test.py").write_text(text)
    return tmp_path


def test_function_gets_answer_reference_and_row(module) -> None:
    settings = GenerationSet(path="a", metrics=["function"], function="mine_of_test:length")
    metric = build_metrics(settings, "a")["function"]
    result = metric.measure([row("r", limit=2), row("r", limit=0)], ["abc", "abc"], module)
    assert [r["function"] for r in result.rows] == [1, 3] and result.scores["function"].value == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"failed for 1 of 2 answers; the first: a.jsonl:1: ZeroDivisionError"),
        ("words", r"failed for 2 of 2 answers; the first: a.jsonl:0: ValueError"),
    ],
)
def test_function_that_raises_is_counted_and_named(name, message, module) -> None:
    with pytest.raises(MetricFailure, match=message):
        measure("function", [("a", "a"), ("", "a")], module, function=f"mine_of_test:{name}")


CHECK = "evaluation.generation={{s: {{path: 'dtrain:tiny-text/questions.jsonl', {}}}}}"


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ("metrics: [rogue]", ["must be one of", "did you mean rouge?"]),
        ("metrics: [regex]", ["regex needs the key regex"]),
        ("regex: a", ["only the metric regex reads it"]),
        ("metrics: [regex], regex: '(a'", ["s.regex: (a", "not a pattern", "missing )"]),
        ("metrics: [json_valid], json_schema: no.json", ["s.json_schema: no.json"]),
        (
            "metrics: [json_valid], json_schema: bad.json",
            ["not a JSON schema: type: 'text' is not"],
        ),
        ("metrics: [json_valid], json_schema: list.json", ["it is no object"]),
        ("metrics: [function], function: no_such_module:f", ["ModuleNotFoundError"]),
        ("metrics: [function], function: mine_of_test:none", ["AttributeError"]),
        ("metrics: [function], function: mine_of_test:two", ["cannot be called with (prediction"]),
        ("metrics: [function], function: mine_of_test", ["write package.module:name"]),
        ("metrics: [judge], judge: {endpoint: 'ftp://a', model: m}", ["s.judge.endpoint"]),
        ("top_p: 0.5", ["without a temperature"]),
        ("format: text", ["must be one of"]),
    ],
)
def test_bad_settings_are_refused_at_check(settings, messages, module) -> None:
    (module / "bad.json").write_text('{"type": "text"}')
    (module / "list.json").write_text("[]")
    with pytest.raises(UserError) as error:
        check_metrics(load_recipe("tiny", [CHECK.format(settings)]))
    for message in messages:
        assert message in str(error.value)
    assert "evaluation.generation.s" in str(error.value)


def test_a_gate_names_a_score_of_the_set() -> None:
    gate = "evaluation.gates={{s: {{{}max_drop: 0.1}}}}"
    load_recipe("tiny", [CHECK.format("metrics: [rouge]"), gate.format("metric: rouge2, ")])
    with pytest.raises(UserError, match="did you mean rouge1"):
        load_recipe("tiny", [CHECK.format("metrics: [rouge]"), gate.format("metric: rouge_1, ")])
    with pytest.raises(UserError, match="no metrics that a gate could check"):
        load_recipe("tiny", [CHECK.format("limit: 2"), gate.format("")])


def test_missing_extra_is_refused_with_its_command(monkeypatch) -> None:
    monkeypatch.setattr("dtrain.config.generation_checks.find_spec", lambda name: None)
    for kind, extra in (("rouge", "metrics"), ("bleu", "metrics"), ("json_valid", "metrics")):
        with pytest.raises(UserError, match=rf"pip install 'dtrain\[{extra}\]'"):
            load_recipe("tiny", [CHECK.format(f"metrics: [{kind}]")])


@pytest.fixture
def judge(monkeypatch):
    """judge(answer) → a running server."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    running: list[Server] = []

    def run(answer) -> Server:
        running.append(Server(answer))
        return running[-1]

    yield run
    for server in running:
        server.close()


def rated(server: Server, pairs, run: Path, **settings: Any) -> MetricResult:
    settings = {"endpoint": server.url, "model": "m", **settings}
    return measure("judge", pairs, run, judge=settings)


def test_judge_rates_each_distinct_answer_once(judge, tmp_path) -> None:
    server = judge(lambda body, n: f"Good. Rating: [[{8 if 'red' in str(body) else 3}]]")
    pairs = [("red", "red"), ("blue", "red reference"), ("blue", "other")]
    result = rated(server, pairs, tmp_path)
    assert [r["judge"] for r in result.rows] == [8, 8, 3]
    assert rated(server, pairs, tmp_path).rows == result.rows
    assert len(server.bodies) == 3  # the second time nothing was requested
    assert "sk-of-a-test" not in (tmp_path / "judge.jsonl").read_text()
    rated(server, [("other", "red")], tmp_path)
    assert len(server.bodies) == 4


def test_replies_without_a_rating_are_counted(judge, tmp_path) -> None:
    server = judge(lambda body, n: "I cannot say" if "question 1" in str(body) else "[[10]]")
    result = rated(server, [("a", "b"), ("a", "b"), ("a", "b")], tmp_path)
    assert [r["judge"] for r in result.rows] == [10, None, 10]
    assert result.scores["judge"].value == 10 and "1 of 3 replies" in result.note


def test_judge_stops_at_its_limit_of_requests(judge, tmp_path) -> None:
    server = judge(lambda body, n: "[[5]]")
    pairs = [(str(n), "b") for n in range(6)]
    with pytest.raises(MetricFailure, match=r"a larger judge\.max_requests"):
        rated(server, pairs, tmp_path, max_requests=4)
    assert len(server.bodies) == 4
    rated(server, pairs, tmp_path, max_requests=6)
    assert len(server.bodies) == 6


def test_judge_that_is_down_has_no_score(judge, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dtrain.augmentation.endpoint.MAX_RETRIES", 0)
    server = judge(lambda body, n: "[[5]]")
    settings = {"endpoint": server.url, "model": "m"}
    chosen = GenerationSet.model_validate({"path": "a", "metrics": ["judge"], "judge": settings})
    metric = build_metrics(chosen, "a")["judge"]
    assert metric.problem() == ""
    server.close()
    assert "Connection error" in metric.problem()
    with pytest.raises(MetricFailure, match="Connection error"):
        rated(server, [("a", "b")], tmp_path)
