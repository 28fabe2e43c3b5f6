"""`dtrain data augment` against a chat-completion server that fails in many ways."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
from typer.testing import CliRunner

from dtrain.augmentation import augment as module
from dtrain.augmentation.augment import AugmentationTask, augment
from dtrain.augmentation.endpoint import Endpoint
from dtrain.augmentation.request_pool import SpendingLimits
from dtrain.cli.root import app
from dtrain.config.data import Source
from dtrain.core.errors import UserError
from dtrain.data.records import open_source, read_records
from dtrain.data.sources import find_source_files
from tests.unit.chat_server import Server, reply

KEY = "sk-of-nobody-0123456789"


def requested_text(body) -> str:
    """The text between the tags, or the last question."""
    text = body["messages"][-1]["content"]
    match = re.search(r"<(instruction|text)>\n(.*)\n</\1>", text, re.DOTALL)
    return match.group(2) if match else text


def rewrite_reply(body, number=0) -> str:
    """A rewrite that depends on the request alone."""
    words = requested_text(body).rstrip("?").split()
    if body["seed"]:
        return f"Explain to a child of {body['seed'] + 5} years: {' '.join(sorted(words))}."
    return f"Could you tell me, in short: {' '.join(reversed(words))}?"


@pytest.fixture
def serve(monkeypatch):
    """serve(answer) → a running server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    running = []

    def run(answer=rewrite_reply):
        running.append(Server(answer))
        return running[-1]

    yield run
    for server in running:
        server.close()


NOUNS = ["kettle", "harbour", "violin", "glacier", "lantern"]
NOUNS += ["orchard", "compass", "ledger", "mirror", "anchor"]
ROWS = [
    {"instruction": f"What is a {noun} made for, number {n}?", "output": f"It is for {noun} work."}
    for n, noun in enumerate(NOUNS)
]


@pytest.fixture
def make(tmp_path, write_rows, monkeypatch):
    """make(server, rows, how, limits, …) → the summary; the output is in tmp_path/out."""
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))

    def run(server, rows=ROWS, how="rewrite", limits=None, *, model="m", **settings):
        source = open_source(Source(path=write_rows("a.jsonl", rows)))
        endpoint = Endpoint(server.url, model, 64, 0.5)
        out = tmp_path / "out"
        return augment(
            AugmentationTask(source, how, **settings), endpoint, limits or SpendingLimits(), out
        )

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_generated_in_source_order_and_labeled(serve, make, tmp_path) -> None:
    server = serve()
    summary = make(server, copies=2)
    rows = lines(tmp_path / "out" / "generated.jsonl")
    source = str(tmp_path / "a.jsonl")
    assert summary["counts"] == {"generated": 20}
    assert [row["generated_by"] for row in rows] == [
        {"model": "m", "how": "rewrite", "from": f"{source}:{n}", "copy": copy}
        for n in range(1, 11)
        for copy in range(2)
    ]
    assert [m["content"] for m in rows[3]["messages"]] == [
        "Explain to a child of 6 years: 1 What a for, harbour is made number.",
        ROWS[1]["output"],
    ]
    assert summary["spent"] == {"requests": 20, "tokens_in": 200, "tokens_out": 100}
    files = find_source_files(Source(path=str(tmp_path / "out" / "generated.jsonl")), tmp_path)
    assert len(list(read_records(files, "auto"))) == 20


def test_alternative_answers_keep_the_conversation(serve, make, tmp_path) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Since it is so, and was so before."},
    ]
    server = serve(lambda body, n: "It grew that way over many years.")
    make(server, [{"messages": talk}], "answers")
    assert server.bodies[0]["messages"] == talk[:2]
    (row,) = lines(tmp_path / "out" / "generated.jsonl")
    assert row["messages"] == [*talk[:2], {**talk[2], "content": server.answer(0, 0)}]


def test_backtranslation_requests_the_instruction_of_a_text(serve, make, tmp_path) -> None:
    server = serve(lambda body, n: "<think>hm</think><instruction>\nTell of a cat\n</instruction>")
    make(server, [{"text": "A cat sat on the mat, and stayed there."}], "backtranslate")
    (row,) = lines(tmp_path / "out" / "generated.jsonl")
    assert [m["content"] for m in row["messages"]] == [
        "Tell of a cat",
        "A cat sat on the mat, and stayed there.",
    ]


def test_a_rewrite_keeps_the_alpaca_input(serve, make, tmp_path) -> None:
    rows = [{"instruction": "Count the words", "input": "one two three", "output": "There are 3."}]
    server = serve(lambda body, n: "How many words are there?")
    make(server, rows)
    assert requested_text(server.bodies[0]) == "Count the words"
    (row,) = lines(tmp_path / "out" / "generated.jsonl")
    assert row["messages"][0] == {
        "role": "user",
        "content": "How many words are there?\n\none two three",
        "instruction": "How many words are there?",
        "input": "one two three",
    }


def test_bad_replies_are_rejected_with_a_reason(serve, make, tmp_path) -> None:
    answers = {
        "kettle": "WHAT is a  harbour made for, number 1?",  # is in the source
        "harbour": "What is a harbour made for, number 1 ?!",  # nearly so
        "violin": "I'm sorry, but I can't help with that.",
        "glacier": "It is for glacier work.",  # the answer
        "lantern": "Ã©tÃ© Ã  la franÃ§aise, dÃ©jÃ  vu Ã  NoÃ«l",
        "orchard": "Name the use of it",
        "compass": "Name the use of it",  # as made before
    }

    def answer(body, n):
        noun = next(noun for noun in NOUNS if noun in requested_text(body))
        finish = "length" if noun == "ledger" else "stop"
        return 200, reply(answers.get(noun) or rewrite_reply(body), finish), {}

    summary = make(serve(answer))
    reasons = [line["reason"] for line in lines(tmp_path / "out" / "rejected.jsonl")]
    assert reasons == [
        *("exact_duplicate", "near_duplicate", "refusal", "same", "garbled"),
        *("exact_duplicate", "cut_off"),
    ]
    assert summary["counts"]["generated"] == 3


def test_an_equal_answer_to_another_question_is_not_a_duplicate(serve, make, tmp_path) -> None:
    server = serve(lambda body, n: "Yes, that is how it is.")
    assert make(server, how="answers", copies=2)["counts"] == {
        "exact_duplicate": 10,
        "generated": 10,
    }


@pytest.mark.parametrize("status", [429, 500, 503])
def test_requests_to_a_busy_server_are_retried(serve, make, status) -> None:
    seen = Counter()

    def answer(body, n):
        seen[requested_text(body)] += 1
        wait = {"retry-after-ms": "1"}
        return (
            rewrite_reply(body)
            if seen[requested_text(body)] > 2
            else (status, {"error": {"message": "x"}}, wait)
        )

    summary = make(serve(answer), ROWS[:3])
    assert summary["counts"] == {"generated": 3} and not summary["failed"]


MALFORMED = {
    "no JSON": (200, b"{]", {}),
    "no choice": (200, {"id": "x", "choices": []}, {}),
    "no content": (200, reply(None), {}),
    "blank": (200, reply("  "), {}),
    "a list": (200, b"[1]", {}),
    "a page": (200, b"<html>busy</html>", {"content-type": "text/html"}),
    "too long": (400, {"error": {"message": "too many tokens"}}, {}),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_reply_affects_only_its_row_until_the_next_run(serve, make, content) -> None:
    server = serve(
        lambda body, n: content if "harbour" in requested_text(body) else rewrite_reply(body)
    )
    summary = make(server)
    assert summary["counts"] == {"generated": 9} and summary["failed"] == 1
    assert "a.jsonl:2: " in summary["failures"][0]
    server.answer, server.bodies = rewrite_reply, []
    assert make(server)["counts"] == {"generated": 10} and len(server.bodies) == 1


def test_repeated_failures_stop_the_run_and_keep_earlier_replies(serve, make, tmp_path) -> None:
    server = serve(lambda body, n: rewrite_reply(body) if n <= 3 else (200, b"{]", {}))
    with pytest.raises(UserError, match="5 requests in a row failed"):
        make(server, concurrency=1)
    assert len(server.bodies) == 8
    assert len(lines(tmp_path / "out" / "generated.jsonl")) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_rejected_key_stops_at_once_and_is_not_shown(serve, make, tmp_path, status) -> None:
    server = serve(lambda body, n: (status, {"error": {"message": f"no such key: {KEY}"}}, {}))
    with pytest.raises(UserError, match=r"no such key: \[key\]") as error:
        make(server, concurrency=1)
    assert len(server.bodies) == 1 and server.keys == {f"Bearer {KEY}"}
    files = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert len(files) > 3 and all(KEY not in text for text in [*files, str(error.value)])


def test_no_limit_is_exceeded_and_a_raised_limit_continues(serve, make) -> None:
    server = serve()
    assert make(server, limits=SpendingLimits(requests=4))["limit_reached"]
    assert len(server.bodies) == 4
    summary = make(server, limits=SpendingLimits(requests=10))
    assert len(server.bodies) == 10 and summary["counts"] == {"generated": 10}


def test_tokens_and_cost_stay_within_their_limits(serve, make) -> None:
    server = serve(lambda body, n: (200, reply(rewrite_reply(body), usage=(100, 64)), {}))
    summary = make(server, limits=SpendingLimits(tokens=1500), concurrency=8)
    spent = summary["spent"]
    assert 0 < spent["tokens_in"] + spent["tokens_out"] <= 1500 and summary["limit_reached"]
    limits = SpendingLimits(cost=0.002, prices=(1.0, 2.0))
    more = make(server, limits=limits, copies=5)
    assert spent["requests"] <= more["spent"]["requests"] < 50 and more["cost"] <= 0.002


def test_the_maximum_is_charged_if_the_server_reports_no_usage(serve, make) -> None:
    server = serve(lambda body, n: (200, reply(rewrite_reply(body), usage=None), {}))
    summary = make(server, ROWS[:1])
    assert summary["spent"]["tokens_out"] == 64 and summary["spent"]["tokens_in"] > 300


EMPTY = {
    "counted": ((200, reply("  ", usage=(900, 60)), {}), [900, 60]),
    "uncounted": ((200, b"{]", {}), None),
}


@pytest.mark.parametrize(("content", "tokens"), EMPTY.values(), ids=EMPTY)
def test_an_unusable_reply_counts_against_the_limits_of_later_runs(
    serve, make, tmp_path, content, tokens
) -> None:
    server = serve(lambda body, n: content)
    first = make(server, ROWS[:1])["spent"]
    assert [first["tokens_in"], first["tokens_out"]] == (tokens or [first["tokens_in"], 64])
    paid = first["tokens_in"] + first["tokens_out"]
    summary = make(server, ROWS[:1], limits=SpendingLimits(tokens=paid + 100))
    assert len(server.bodies) == 1 and summary["limit_reached"]  # the next may pass the limit
    server.answer = rewrite_reply
    summary = make(server, ROWS[:1])
    assert summary["counts"] == {"generated": 1} and summary["spent"]["requests"] == 2
    assert summary["spent"]["tokens_in"] == first["tokens_in"] + 10


def test_output_path_that_is_a_file_is_refused(serve, make, tmp_path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot be created"):
        make(serve())
    assert (tmp_path / "out").read_text() == "mine"


def test_concurrency_is_limited(serve, make) -> None:
    together = threading.Barrier(3)  # passes only when three requests are under way

    def answer(body, n):
        together.wait(timeout=30)
        return rewrite_reply(body)

    server = serve(answer)
    make(server, ROWS[:9], concurrency=3)
    assert server.max_pending == 3


def test_requests_per_minute_are_limited(serve, make, monkeypatch) -> None:
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("dtrain.augmentation.request_pool.asyncio.sleep", sleep)
    make(serve(), ROWS[:4], limits=SpendingLimits(per_minute=6), concurrency=1)
    assert [round(wait, -1) for wait in waits] == [0, 10, 20, 30]


def test_changed_settings_need_another_folder(serve, make, tmp_path) -> None:
    server = serve()
    make(server)
    for change in ({"how": "answers"}, {"model": "n"}, {"rows": ROWS[1:]}):
        with pytest.raises(UserError, match=r"was started with a different (how|model|source)"):
            make(server, **change)
    assert len(server.bodies) == 10


def test_incomplete_last_line_is_requested_again_and_corrupt_line_is_named(
    serve, make, tmp_path
) -> None:
    server = serve()
    make(server)
    expected = (tmp_path / "out" / "generated.jsonl").read_bytes()
    replies = tmp_path / "out" / "replies.jsonl"
    whole = replies.read_bytes()
    replies.write_bytes(whole[:-9])
    make(server)
    assert len(server.bodies) == 11
    assert (tmp_path / "out" / "generated.jsonl").read_bytes() == expected
    replies.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match=r"replies.jsonl:1: not a line that dtrain wrote"):
        make(server)


def test_a_folder_in_use_is_refused(serve, make, tmp_path) -> None:
    server = serve()
    (tmp_path / "out").mkdir()
    with module.FolderLock(tmp_path / "out"), pytest.raises(UserError, match="is in use"):
        make(server)


@pytest.mark.parametrize(
    "address",
    ["localhost:8", "http://", "http://a:kept@c/v1", "https://h/v1?key=kept", "http://[kept"],
)
def test_a_url_with_credentials_is_refused_without_showing_them(address) -> None:
    with pytest.raises(UserError, match=r"not the URL|would be logged") as error:
        Endpoint(address, "m", 64, 0.5)
    assert "kept" not in str(error.value)


def start_command(server, tmp_path, *more):
    names = ["--how", "rewrite", "--endpoint", server.url, "--model", "m"]
    command = [sys.executable, "-m", "dtrain", "data", "augment", str(tmp_path / "a.jsonl"), *names]
    return subprocess.Popen(
        [*command, "--out", str(tmp_path / "cli"), *more],
        env={**os.environ, "OPENAI_API_KEY": KEY, "DTRAIN_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_rerun_resumes_after_a_kill(serve, make, tmp_path) -> None:
    server = serve()
    make(server)
    expected = (tmp_path / "out" / "generated.jsonl").read_bytes()
    server.bodies = []
    process = None
    killed = threading.Event()

    def answer(body, n):
        if n == 5:
            os.kill(process.pid, signal.SIGKILL)
            killed.set()
        return rewrite_reply(body)

    server.answer = answer
    process = start_command(server, tmp_path, "--at-once", "1")
    assert killed.wait(120)
    process.communicate()
    assert len(lines(tmp_path / "cli" / "replies.jsonl")) == 4
    server.answer, server.bodies = rewrite_reply, []
    out, _ = start_command(server, tmp_path).communicate(timeout=120)
    assert "10 requests, 100 tokens in, 50 out" in out and KEY not in out
    assert len(server.bodies) == 6
    assert (tmp_path / "cli" / "generated.jsonl").read_bytes() == expected


CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "Is it cold in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "-8"},
        {"role": "assistant", "content": "Yes, it is eight below zero there."},
    ],
    "tools": TOOLS,
}
TALK = {"messages": [WITH_TOOLS["messages"][0], WITH_TOOLS["messages"][-1]]}
PAIR = {"prompt": "Is it cold?", "chosen": "Yes, it is very cold.", "rejected": "No idea at all."}
BAD = {"prompt": "Is it far?", "completion": "I'm sorry, I can't help.", "label": False}


def test_a_rewrite_keeps_tool_calls(serve, make, tmp_path) -> None:
    server = serve(lambda body, n: f"Tell me this: {requested_text(body)}")
    make(server, [WITH_TOOLS])
    (row,) = lines(tmp_path / "out" / "generated.jsonl")
    assert row["messages"][0]["content"] == "Tell me this: Is it cold in Oslo?"
    assert [m.get("tool_calls") is not None for m in row["messages"]] == [False, True, False, False]
    assert row["messages"][-1] == WITH_TOOLS["messages"][-1] and row["tools"] == TOOLS


def test_a_rewrite_keeps_the_preference(serve, make, tmp_path, write_rows) -> None:
    server = serve(lambda body, n: f"Tell me this: {requested_text(body)}")
    make(server, [PAIR])
    (row,) = lines(tmp_path / "out" / "generated.jsonl")
    for side in ("chosen", "rejected"):
        contents = [m["content"] for m in row[side]]
        assert contents == ["Tell me this: Is it cold?", PAIR[side]]
    source = open_source(Source(path=write_rows("kto.jsonl", [BAD])))
    endpoint = Endpoint(server.url, "m", 64, 0.5)
    augment(AugmentationTask(source, "rewrite"), endpoint, SpendingLimits(), tmp_path / "kto")
    (row,) = lines(tmp_path / "kto" / "generated.jsonl")
    assert row["label"] is False and row["messages"][0]["content"] == "Tell me this: Is it far?"


@pytest.mark.parametrize("how", ["answers", "backtranslate"])
@pytest.mark.parametrize(
    ("row", "reason"), [(PAIR, "a preference between answers"), (WITH_TOOLS, "with tools")]
)
def test_a_source_without_usable_rows_is_refused(serve, make, tmp_path, how, row, reason) -> None:
    server = serve()
    with pytest.raises(UserError) as error:
        make(server, [row], how)
    assert reason in error.value.message and error.value.where == str(tmp_path / "a.jsonl")
    assert not server.bodies


def test_skipped_rows_are_reported(serve, make, capsys) -> None:
    summary = make(serve(), [{"messages": WITH_TOOLS["messages"]}, TALK], "answers")
    assert summary["counts"] == {"generated": 1}
    assert "skips: 1 (with tools)" in capsys.readouterr().out


def test_columns_can_be_renamed(serve, write_rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    server = serve()
    path = write_rows("q.jsonl", [{"question": r["instruction"], "a": r["output"]} for r in ROWS])
    where = ["--endpoint", server.url, "--model", "m", "--out", str(tmp_path / "out")]
    call = ["data", "augment", path, "--how", "rewrite", *where]
    refused = CliRunner().invoke(app, [*call, "--column", "question=instruction"])
    assert refused.exit_code != 0 and not server.bodies
    done = CliRunner().invoke(
        app, [*call, "--column", "instruction=question", "--column", "output=a"]
    )
    assert done.exit_code == 0 and len(lines(tmp_path / "out" / "generated.jsonl")) == len(ROWS)
