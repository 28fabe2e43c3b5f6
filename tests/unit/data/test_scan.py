"""What a scan finds, what it leaves alone, and that its report shows no secret."""

from __future__ import annotations

import importlib.util
import json
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dtrain.config.schema import Source
from dtrain.data.sources import find_source_files
from dtrain.data_quality import duplicates, pii, shingles
from dtrain.data_quality.finding_types import BIT, MEANINGS
from dtrain.data_quality.html_report import write_page
from dtrain.data_quality.report import report
from dtrain.data_quality.sample import Sample
from dtrain.data_quality.scan import Input, scan
from dtrain.data_quality.terminal import tables
from dtrain.data_quality.text_checks import faults, is_cut_off
from dtrain.pipeline.data_inspection import TokenCounter

SCRIPTS = Path(__file__).parents[2] / "bench"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return script("data_planted")


@pytest.fixture
def scanned(tmp_path, write_rows):
    """scanned(rows, …) → findings"""

    def run(rows, **how):
        parts = find_source_files(Source(path=write_rows("a.jsonl", rows)), tmp_path / "cache")
        return scan([Input("a", parts, "auto")], **how)

    return run


def test_planted_faults_are_found_and_nothing_else(bench, tmp_path) -> None:
    scores = bench.measure(2200, tmp_path)
    assert set(scores) == {*BIT, "broken"} - {"template", "overlong", "special_tokens"}
    wrong = {kind: score for kind, score in scores.items() if min(score) < 0.95}
    assert not wrong


def test_faults_planted_by_a_second_hand_are_found(tmp_path) -> None:
    heldback = script("data_heldback")
    scores = {kind: (p, r) for kind, p, r, _ in heldback.measure(800, 3, tmp_path)}
    assert set(scores) > heldback.EXACT
    assert not {k: scores[k] for k in heldback.EXACT if min(scores[k]) < 0.95}


def test_other_processes_find_the_same(scanned, bench) -> None:
    rows = [
        json.loads(line) for line in bench.planted(1800)[0] if '"output"' in line and "}" in line
    ]
    alone, together = scanned(rows), scanned(rows, processes=2)
    assert (alone.flags == together.flags).all() and alone.notes == together.notes
    assert report(alone) == report(together)


def test_memory_holds_sketches_and_no_rows(scanned) -> None:
    found = scanned([{"instruction": f"q {n}", "output": "words " * 500} for n in range(50)])
    assert found.state_bytes() / found.rows < 180


class TestPersonal:
    """Whatever has a checksum or a plan of numbers is checked by it."""

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("write to mei.lin+x@mail.com.cn.", "email"),
            ("身份证11010519491231002X。", "id_number"),
            ("SSN 536-90-4399", "id_number"),
            ("IBAN GB82 WEST 1234 5698 7654 32", "id_number"),
            ("CPF 390.533.447-05", "id_number"),
            ("pay with 4539 5787 6362 1486 now", "bank_card"),
            ("电话13812345678。", "phone"),
            ("call +44 20 7946 0958 or", "phone"),
            ("call (650) 253-0000", "phone"),
            ("from 8.8.8.8:53", "ip_address"),
            ("to 2001:4860:4860::8888 by", "ip_address"),
            ("key AKIAIOSFODNN7EXAMPLE", "secret"),
            ("-----BEGIN RSA PRIVATE KEY-----", "secret"),
            ("电话+86 10 6552 9988 12 个", "phone"),
            ("IBAN BE71 0961 2345 6769 AND MORE", "id_number"),
            ("510107196208017328", "id_number"),
            ("密钥AKIAIOSFODNN7EXAMPLE是", "secret"),
            ("地址2001:4860:4860::8888。", "ip_address"),
        ],
    )
    def test_found_and_masked(self, text, kind) -> None:
        (one,) = pii.find(text)
        assert one.kind == kind
        masked = pii.mask(text)
        assert masked == f"{text[: one.start]}[{kind}]{text[one.stop :]}"
        assert not pii.find(masked)
        assert text[one.start : one.stop] not in pii.hidden(text, one)

    def test_a_mask_leaves_the_words_beside_it(self) -> None:
        text = "请写信到lin@mail.com.cn谢谢，或+8613812345678找müller@web.de。"
        assert pii.mask(text) == "请写信到[email]谢谢，或[phone]找[email]。"

    @pytest.mark.parametrize(
        "text",
        [
            "11010519491231002",
            "110105194912310021",
            "4539 5787 6362 1487",
            "192.168.1.1, 127.0.0.1, 10.1.2.3 and 999.1.1.1",
            "on 2024-01-02 03:04:05, release 4.12.0",
            "someone@example.com, user@localhost, @handle",
            "3.14159265358979 and 1234567890123456",
            "ISBN 978-3-16-148410-0",
            "12345678901",
        ],
    )
    def test_left_alone(self, text) -> None:
        assert pii.find(text) == []

    @given(st.text(alphabet="0123456789 -.()+@aX:/", max_size=60))
    def test_finds_never_overlap_and_masking_is_final(self, text) -> None:
        found = pii.find(text)
        assert all(a.stop <= b.start for a, b in pairwise(found))
        assert all(0 <= one.start < one.stop <= len(text) for one in found)


def test_a_report_shows_no_secret(scanned, tmp_path) -> None:
    secrets = ("AKIAIOSFODNN7EXAMPLE", "4539578763621486", "mei.lin@mail.com.cn")
    rows = [{"instruction": f"Who is <b>{s}</b>?", "output": f"It is {s}, truly."} for s in secrets]
    told = report(scanned(rows))
    write_page(tmp_path / "a.html", told, "<a>")
    page = (tmp_path / "a.html").read_text()
    for secret in secrets:
        assert secret not in json.dumps(told) and secret not in page
    assert "&lt;b&gt;" in page and "<title>&lt;a&gt;" in page
    assert {f["kind"] for f in told["findings"]} >= {"secret", "bank_card", "email"}
    assert list(tables(told))


def test_every_kind_has_a_meaning() -> None:
    assert set(MEANINGS) == {*BIT, "broken"}


def test_tokens_are_counted_as_a_stage_makes_them(scanned, tokenizer, prepared, tmp_path) -> None:
    rows = [{"instruction": "Who?", "output": "Me. " * n} for n in range(1, 20)]
    counter = TokenCounter(tokenizer, "auto")
    found = scanned(rows, tokens=counter, sequence_length=80)
    source = {"path": str(tmp_path / "a.jsonl")}
    mixture = prepared("sft", [source], packing=False, sequence_length=512)
    numbers = np.arange(mixture.rows_per_epoch)
    assert sorted(found.column("tokens")) == sorted(mixture.tokens(numbers))
    over = int((mixture.tokens(numbers) > 80).sum())
    assert 0 < over == int(found.having("overlong").sum())


def test_rows_that_the_template_refuses_are_findings(scanned, make_tokenizer) -> None:
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    strict += "{% endif %}{{ m.content }}{% endfor %}"
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "system": "s"}]
    found = scanned(rows, tokens=TokenCounter(make_tokenizer(strict), "auto"))
    assert found.having("template").tolist() == [False, True]


def test_an_empty_source_has_a_report(scanned) -> None:
    told = report(scanned([]))
    assert told["rows"] == 0 and told["verdict"][0]["text"] == "there is no row to train on"


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("It was a dark night. The wind blew hard and nobody in the house could", True),
        ("It was a dark night. The wind blew hard and nobody in the house slept.", False),
        ("Three things matter here. They are:\n- apples\n- pears\n- plums and peaches", False),
        ("今天天气很好。我们一起去公园散步，看到了很多美丽的花朵，还有", True),
        ("```python\nprint(1)", True),
        ("Use this code.\n```python\nprint(1)\n```", False),
        ("船长在日出之前出售航海图。女医生在深秋时节整理旧钟表。养蜂人在山谷对面搬运8", True),
    ],
)
def test_cut_off(text, cut) -> None:
    long = "A sentence that is complete and long enough to count. "
    assert is_cut_off(long + text) is cut


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("As an AI assistant, I'd be more than happy to help you with the plan.", False),
        ("As an AI language model, I do not have a favourite colour.", True),
        ("As an AI, I can't see pictures.", True),
        ("As an AI I love maths. It is not hard.", False),
    ],
)
def test_an_assistant_that_names_itself_has_not_yet_refused(answer, refuses) -> None:
    kinds = {kind for kind, _, _ in faults(Sample("What is it?", answer))}
    assert ("refusal" in kinds) is refuses


def test_a_long_text_of_few_words_is_no_repetition() -> None:
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(60)]
    long = " ".join(rng.choice(words, 900))
    kinds = {kind for kind, _, _ in faults(Sample("Tell me.", f"{long}."))}
    assert "repeated_lines" not in kinds
    again = {kind for kind, _, _ in faults(Sample("Tell me.", "over and " * 40))}
    assert "repeated_lines" in again


def test_a_terminal_shows_places_without_their_folder(scanned, tmp_path) -> None:
    rows = [{"instruction": "Who was it?", "output": "It was the red fox."}] * 2
    console = Console(file=StringIO(), width=200)
    for part in tables(report(scanned(rows))):
        console.print(part)
    shown = console.file.getvalue()
    assert "a.jsonl:2 as a.jsonl:1" in shown


class TestNear:
    def test_runs_of_a_text_are_those_of_the_text_alone(self) -> None:
        texts = ["", "abc", "abcdef", "一二三四五六七"]
        hashes, offsets = shingles.run_hashes(texts, 5)
        assert np.diff(offsets).tolist() == [0, 1, 2, 3]
        for n, text in enumerate(texts):
            alone, _ = shingles.run_hashes([text], 5)
            assert (hashes[offsets[n] : offsets[n + 1]] == alone).all()

    def test_similarity_is_that_of_the_sets(self) -> None:
        rng = np.random.default_rng(0)
        text = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), 2000))
        half = text[:1000] + "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), 1000))
        sketches = shingles.signatures([text, half]).astype(np.uint8)
        alike = duplicates._similarity(sketches, np.array([1]), np.array([0]))[0]
        assert abs(alike - 1 / 3) < 0.1

    def test_many_equal_rows_take_no_square_of_work(self) -> None:
        matrix = shingles.signatures(["the same text again and again"]).repeat(20_000, axis=0)
        done = np.zeros(20_000, bool)
        found = list(duplicates.near(matrix.astype(np.uint8), 0.8, done))
        later, earlier, how = (np.concatenate(column) for column in zip(*found, strict=True))
        assert later.tolist() == list(range(1, 20_000))
        assert (earlier == 0).all() and (how == 1).all() and done.tolist() == [False, *done[1:]]


def test_a_sample_of_a_conversation_has_all_turns() -> None:
    assert Sample("a", "b").whole == "a\nb"
