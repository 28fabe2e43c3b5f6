"""A scan finds planted problems and nothing else, and its report shows no secret."""

from __future__ import annotations

import importlib.util
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dtrain.config.data import Source
from dtrain.data.records import SourceRows
from dtrain.data.sources import find_source_files
from dtrain.data_quality.finding_types import FINDING_TYPES, FLAG_BITS
from dtrain.data_quality.report import build_report, terminal_report, write_html
from dtrain.data_quality.scan import scan

BENCHMARKS = Path(__file__).parents[2] / "bench"


def load_benchmark(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def planted():
    return load_benchmark("data_planted")


@pytest.fixture
def scan_rows(tmp_path, write_rows):
    """scan_rows(rows, …) → the result of a scan."""

    def run(rows, **options):
        files = find_source_files(Source(path=write_rows("a.jsonl", rows)), tmp_path / "cache")
        return scan([SourceRows("a", files, "auto")], **options)

    return run


def test_planted_problems_are_found_and_nothing_else(planted, tmp_path) -> None:
    scores = planted.measure(2200, tmp_path)
    others = {"template", "overlong", "special_tokens", "same_answers", "other_prompts"}
    assert set(scores) == {*FLAG_BITS, "broken"} - others
    wrong = {kind: score for kind, score in scores.items() if min(score) < 0.95}
    assert not wrong


def test_problems_planted_independently_of_the_checks_are_found(tmp_path) -> None:
    heldback = load_benchmark("data_heldback")
    scores = {kind: (p, r) for kind, p, r, _ in heldback.measure(800, 3, tmp_path)}
    assert set(scores) > heldback.EXACT
    assert not {k: scores[k] for k in heldback.EXACT if min(scores[k]) < 0.95}


def test_worker_processes_find_the_same(scan_rows, planted) -> None:
    rows = [
        json.loads(line) for line in planted.planted(1800)[0] if '"output"' in line and "}" in line
    ]
    single, parallel = scan_rows(rows), scan_rows(rows, processes=2)
    assert (single.flags == parallel.flags).all() and single.notes == parallel.notes
    assert build_report(single) == build_report(parallel)


def test_memory_holds_compact_records_and_no_rows(scan_rows) -> None:
    result = scan_rows([{"instruction": f"q {n}", "output": "words " * 500} for n in range(50)])
    assert result.state_bytes() / result.rows < 180


def test_a_report_shows_no_secret(scan_rows, tmp_path) -> None:
    secrets = ("AKIAIOSFODNN7EXAMPLE", "4539578763621486", "mei.lin@mail.com.cn")
    rows = [{"instruction": f"Who is <b>{s}</b>?", "output": f"It is {s}, truly."} for s in secrets]
    report = build_report(scan_rows(rows))
    write_html(tmp_path / "a.html", report, "<a>")
    page = (tmp_path / "a.html").read_text()
    for secret in secrets:
        assert secret not in json.dumps(report) and secret not in page
    assert "&lt;b&gt;" in page and "<title>&lt;a&gt;" in page
    assert {f["kind"] for f in report["findings"]} >= {"secret", "bank_card", "email"}
    assert list(terminal_report(report))


def test_every_finding_has_a_title_and_advice() -> None:
    assert set(FINDING_TYPES) == {*FLAG_BITS, "broken"}


def test_columns_that_no_format_reads_are_reported_once(scan_rows) -> None:
    rows = [{"instruction": f"q {n}", "output": "words", "answr": "x"} for n in range(5)]
    rows += [{"instruction": "q", "output": "more words", "answr": None, "system": "s"}]
    texts = [line["text"] for line in build_report(scan_rows(rows))["verdict"]]
    assert texts.count("column `answr` is not read in 5 rows") == 1
    assert not [text for text in texts if "`system`" in text]


def test_an_empty_source_has_a_report(scan_rows) -> None:
    report = build_report(scan_rows([]))
    assert report["rows"] == 0 and report["verdict"][0]["text"] == "no rows to train on"


def test_the_terminal_shows_locations_without_their_folder(scan_rows, tmp_path) -> None:
    rows = [{"instruction": "Who was it?", "output": "It was the red fox."}] * 2
    console = Console(file=StringIO(), width=200)
    for block in terminal_report(build_report(scan_rows(rows))):
        console.print(block)
    assert "a.jsonl:2 same as a.jsonl:1" in console.file.getvalue()


def verdict(report) -> dict[str, tuple[bool, str]]:
    return {line["text"]: (line["severe"], line["advice"]) for line in report["verdict"]}


def test_pairs_that_cannot_be_compared_and_a_preference_for_length(scan_rows) -> None:
    def turns(*texts):
        roles = ("user", "assistant", "user", "assistant")
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    good = [
        {"prompt": f"What is {n}?", "chosen": f"{n} is a number. " * 3, "rejected": f"It is {n}."}
        for n in range(8)
    ]
    bad = [
        {"prompt": "Same?", "chosen": "The same answer.", "rejected": "The same answer."},
        {"prompt": "Empty?", "chosen": "It is empty.", "rejected": " "},
        {"chosen": turns("A?", "It is A."), "rejected": turns("B?", "It is B, no doubt.")},
        {
            "chosen": turns("A?", "It is A.", "Sure?", "Yes, quite sure."),
            "rejected": turns("A?", "It is A.", "Why?", "No, not at all sure."),
        },
    ]
    result = scan_rows(good + bad)
    found = {kind: result.has_finding(kind).nonzero()[0].tolist() for kind in FLAG_BITS}
    assert found["same_answers"] == [8] and found["empty"] == [9]
    assert found["other_prompts"] == [10, 11]
    notes = [note.text for note in sorted(result.notes["other_prompts"], key=lambda n: n.row)]
    assert notes == ["they differ in turn 1", "they differ in turn 3"]
    report = build_report(result)
    preferences = report["preferences"]
    assert preferences["pairs"] == 12 and preferences["chosen_longer"] == pytest.approx(9 / 12)
    assert preferences["mean_characters_chosen"] > 2 * preferences["mean_characters_rejected"]
    lines = verdict(report)
    (text,) = [line for line in lines if "longer in 75%" in line]
    assert lines[text] == (
        False,
        "the model may learn length: preference.length_normalized: true, or kind: simpo",
    )
    assert lines["pairs of equal answers: 1 (8.3%)"][0]


@pytest.mark.parametrize(
    ("desirable", "severe", "advice"), [(10, True, "both labels"), (5, False, ""), (0, True, "sft")]
)
def test_labels_of_rated_answers(scan_rows, desirable, severe, advice) -> None:
    rows = [
        {"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": n < desirable}
        for n in range(10)
    ]
    report = build_report(scan_rows(rows))
    found = verdict(report)[f"{desirable / 10:.0%} of the rated answers are labeled true"]
    assert found[0] == severe and advice in found[1]


def test_questions_of_one_template_are_no_near_duplicates(scan_rows) -> None:
    question = (
        "A baker has {} loaves of bread and sells {} of them in the morning of the first day. How "
        "many loaves are left for the afternoon, if he bakes no more of them before the evening?"
    )
    other = "Name the {} town of the country, and tell in one sentence how people there {}."
    words = ("oldest", "largest", "smallest"), ("live", "work", "rest")
    rows = [
        {"instruction": question.format(n, n - 5), "output": f"There are {n - (n - 5)} left, {n}."}
        for n in range(10, 90)
    ]
    rows += [
        {
            "instruction": other.format(*pair),
            "output": f"The {pair[0]}, where they {pair[1]}.",
        }
        for pair in zip(*words, strict=True)
    ]
    copies = [rows[3] | {"output": "There are 5 left, 13, I think."}]
    copies += [rows[5] | {"instruction": rows[5]["instruction"].replace("first", "very first")}]
    result = scan_rows(rows + copies)
    assert result.has_finding("near_duplicate").nonzero()[0].tolist() == [83, 84]
    assert all(note.text.startswith("about ") for note in result.notes["near_duplicate"])
