"""A scan finds planted problems and nothing else, and its report shows no secret."""

from __future__ import annotations

import importlib.util
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dtrain.config.schema import Source
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
    assert set(scores) == {*FLAG_BITS, "broken"} - {"template", "overlong", "special_tokens"}
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


def test_an_empty_source_has_a_report(scan_rows) -> None:
    report = build_report(scan_rows([]))
    assert report["rows"] == 0 and report["verdict"][0]["text"] == "no rows to train on"


def test_the_terminal_shows_locations_without_their_folder(scan_rows, tmp_path) -> None:
    rows = [{"instruction": "Who was it?", "output": "It was the red fox."}] * 2
    console = Console(file=StringIO(), width=200)
    for block in terminal_report(build_report(scan_rows(rows))):
        console.print(block)
    assert "a.jsonl:2 same as a.jsonl:1" in console.file.getvalue()
