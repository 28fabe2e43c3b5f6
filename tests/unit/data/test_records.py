"""Formats, file types, `auto`, and broken or hostile files."""

from __future__ import annotations

import csv
import gzip
import json
import os
import zipfile

import datasets
import pyarrow as pa
import pytest

from dtrain.config.data import Source
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError, UserErrors
from dtrain.data import readers
from dtrain.data.conversations import Preference
from dtrain.data.records import BadRecord, detect_source_format, iter_records, read_records
from dtrain.data.sources import find_source_files

ASKED = {"role": "user", "content": "a"}
SAID = {"role": "assistant", "content": "b"}
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.fixture
def load(tmp_path):
    """load(path, format) → the values"""

    def run(path, form="auto", **more):
        source = Source(path=str(path), format=form, **more)
        source_files = find_source_files(source, tmp_path / "cache")
        return [record.value for record in read_records(source_files, form, source.columns)]

    return run


@pytest.fixture
def seen(tmp_path):
    """seen(path) → every row's value or fault, and none is left out"""

    def run(path, form="text"):
        source_files = find_source_files(Source(path=str(path)), tmp_path / "cache")
        return [
            str(item.error).splitlines()[0] if isinstance(item, BadRecord) else item.value
            for item in iter_records(source_files, form)
        ]

    return run


SAME = {
    "messages": {"messages": [ASKED, SAID]},
    "sharegpt": {"conversations": TURNS},
    "prompt_completion": {"prompt": "a", "completion": "b"},
}


@pytest.mark.parametrize("form", SAME)
def test_every_format_gives_the_same_conversation(load, write_rows, form) -> None:
    path = write_rows("a.jsonl", [SAME[form]])
    for named in (form, "auto"):
        (talk,) = load(path, named)
        assert (talk.messages, talk.tools) == ([ASKED, SAID], None)


def test_system_and_history_precede_the_instruction(load, write_rows) -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    (talk,) = load(write_rows("a.jsonl", [row]))
    assert [m["content"] for m in talk.messages] == ["s", "a", "b", "c", "d"]
    (talk,) = load(write_rows("b.jsonl", [{"conversations": TURNS, "system": "s"}]))
    assert talk.messages == [{"role": "system", "content": "s"}, ASKED, SAID]


def test_tool_calls_of_all_formats_are_equal(load, write_rows) -> None:
    openai = [
        ASKED,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        SAID,
    ]
    share = [
        TURNS[0],
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "4"},
        TURNS[1],
    ]
    schema = {"name": "f", "parameters": {}}
    first = load(write_rows("a.jsonl", [{"messages": openai, "tools": [schema]}]))[0]
    second = load(write_rows("b.jsonl", [{"conversations": share, "tools": json.dumps([schema])}]))
    for talk in (first, *second):
        call = talk.messages[1]["tool_calls"][0]["function"]
        assert call == {"name": "f", "arguments": {"x": 1}} and talk.messages[1]["content"] == ""
        assert [m["role"] for m in talk.messages] == ["user", "assistant", "tool", "assistant"]
        assert talk.tools == [{"type": "function", "function": schema}]


def test_three_preference_formats_are_equal(load, write_rows) -> None:
    rows = [
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "c"}},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, {"role": "assistant", "content": "c"}]},
    ]
    for number, row in enumerate(rows):
        (pair,) = load(write_rows(f"{number}.jsonl", [row]))
        assert isinstance(pair, Preference)
        assert pair.chosen.messages == [ASKED, SAID]
        assert [m["content"] for m in pair.rejected.messages] == ["a", "c"]


def test_kto_rows_have_a_label(load, write_rows) -> None:
    rows = [
        {"messages": [ASKED, SAID], "label": True},
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": "a", "completion": "b", "label": "false"},
    ]
    good, bad, also = load(write_rows("a.jsonl", rows))
    assert good.chosen.messages == bad.rejected.messages == [ASKED, SAID]
    assert good.rejected is None and bad.chosen is None and also == bad


@pytest.mark.parametrize("form", ["preference", "kto"])
def test_stages_refuse_preferences(prepared, write_rows, form) -> None:
    row = {"prompt": "a", "completion": "b", "label": True, "chosen": "b", "rejected": "c"}
    keep = ("prompt", "completion", "label") if form == "kto" else ("prompt", "chosen", "rejected")
    path = write_rows("a.jsonl", [{key: row[key] for key in keep}])
    with pytest.raises(UserError, match=f"format: {form} with kind: sft"):
        prepared("sft", [{"path": path}])
    with pytest.raises(UserErrors, match=f"sft cannot train on {form} rows: each row "):
        load_recipe("tiny", [f"stages.task.data.sources.0.format={form}"])
    if form == "preference":  # the way out that the message names works
        columns = {"completion": "chosen"}
        prepared("sft", [{"path": path, "format": "prompt_completion", "columns": columns}])


def test_columns_are_renamed(load, write_rows) -> None:
    path = write_rows("a.jsonl", [{"question": "a", "answer": "b", "instruction": "no"}])
    columns = {"instruction": "question", "output": "answer"}
    for form in ("alpaca", "auto"):
        (talk,) = load(path, form, columns=columns)
        assert [m["content"] for m in talk.messages] == ["a", "b"]
    with pytest.raises(UserError, match="column `reply` is missing; the row has question, answer"):
        load(path, "alpaca", columns={"instruction": "question", "output": "reply"})


def test_unknown_column_is_refused(tmp_path) -> None:
    with pytest.raises(UserErrors) as error:
        load_recipe("tiny", ["stages.task.data.sources.0.columns={instrution: question}"])
    assert "instrution" in str(error.value)


def test_auto_reports_the_detected_format(write_rows, tmp_path) -> None:
    path = write_rows("a.jsonl", [{"title": "x", "body": "y"}])
    source_files = find_source_files(Source(path=path), tmp_path / "cache")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no known format has the columns title, body"):
        detect_source_format(source_files, {})
    assert detect_source_format(source_files, {"text": "body"}) == "text"


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "json.gz", "csv", "csv.gz", "arrow"])
def test_every_file_type_gives_the_same_rows(load, tmp_path, kind) -> None:
    rows = [{"instruction": "a, or\n“b”", "output": str(n)} for n in range(3000)]
    path = tmp_path / f"a.{kind}"
    if kind == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
        (tmp_path / "d" / "data-00000-of-00001.arrow").rename(path)
    else:
        write_packed(path, as_text(rows, kind))
    values = load(path)
    assert [talk.messages[1]["content"] for talk in values] == [str(n) for n in range(3000)]
    assert values[0].messages[0]["content"] == "a, or\n“b”"


def as_text(rows, kind) -> bytes:
    if kind.startswith("jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind.startswith("json"):
        return json.dumps(rows).encode()
    lines = ["instruction,output", *(f'"{r["instruction"]}",{r["output"]}' for r in rows)]
    return "\n".join(lines).encode()


def write_packed(path, content: bytes) -> None:
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_arrow_file_format_is_read(load, tmp_path) -> None:
    table = pa.table({"text": ["x", "y"]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    assert load(tmp_path / "a.arrow") == ["x", "y"]


class TestBroken:
    """Each error names its location, and the rows after it are read."""

    def test_rows_after_a_broken_row_are_read(self, seen, tmp_path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(
            b'{"text": "a"}\n{"text": "\xff"}\n{"text" 1}\n{"text": "b", "text": "c"}\n'
            b'{"text": "d\\u0000"}\n{"txt": "e"}\n{"text": "f\x00"}\n{"text": "z"}\n'
        )
        assert seen(path) == [
            "a",
            f"{path}:2: not UTF-8",
            f"{path}:3: invalid JSON: Expecting ':' delimiter (column 9)",
            f"{path}:4: duplicate key `text`",
            f"{path}:5: `text` contains a NUL at character 1",
            f"{path}:6: column `text` is missing; the row has txt",
            f"{path}:7: invalid JSON: Invalid control character (column 12)",
            "z",
        ]

    def test_nested_duplicate_key_is_reported(self, seen, tmp_path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"messages": [{"role": "user", "role": "tool", "content": "a"}]}\n')
        (message,) = seen(path, "messages")
        assert message.startswith(f"{path}:1: ") and "duplicate key `role`" in message

    def test_overlong_line_is_skipped(self, seen, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a"}\n{"text": "' + "b" * 500 + '"}\n{"text": "c"}\n')
        first, long, last = seen(path)
        assert (first, last) == ("a", "c")
        assert long == f"{path}:2: the line has 513 bytes, the maximum is 100"

    @pytest.mark.parametrize("kind", ["gz", "zst"])
    def test_truncated_compressed_file_is_reported(self, seen, tmp_path, kind) -> None:
        path, whole = tmp_path / f"a.jsonl.{kind}", tmp_path / f"whole.jsonl.{kind}"
        rows = [{"text": os.urandom(40).hex()} for _ in range(9000)]
        write_packed(whole, as_text(rows, "jsonl"))
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        *read_rows, message = seen(path)
        assert read_rows and read_rows == [row["text"] for row in rows[: len(read_rows)]]
        assert message.startswith(f"{path}:{len(read_rows) + 1}: the file is truncated or damaged")
        path.write_bytes(whole.read_bytes()[:40])
        assert "truncated or damaged" in seen(path)[0]

    def test_csv_row_with_too_many_cells_is_reported(self, seen, tmp_path) -> None:
        path = tmp_path / "a.csv"
        path.write_text('text,id\n"a\nb",1\nc,2,3\nd,4\n')
        message = f"{path}:4: 3 cells, but the header has 2 columns"
        assert seen(path) == ["a\nb", message, "d"]
        path.write_text('text\n"a\n')
        assert seen(path) == [f"{path}:2: invalid CSV: unexpected end of data"]

    def test_symlink_out_of_the_folder_is_refused(self, load, tmp_path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "secret.jsonl").write_text('{"text": "a"}\n')
        (tmp_path / "in" / "a.jsonl").symlink_to("../secret.jsonl")
        with pytest.raises(
            UserError, match=r"in/a\.jsonl: a symlink to a file outside of its folder: /"
        ):
            load(tmp_path / "in")
        assert load(tmp_path / "in" / "a.jsonl") == ["a"]

    def test_archive_is_refused(self, load, tmp_path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("../evil.jsonl", "{}")
        with pytest.raises(UserError, match=r"a\.zip: archives are not unpacked"):
            load(tmp_path / "a.zip")
        assert [p.name for p in tmp_path.rglob("*.jsonl")] == []

    def test_fields_of_any_length_are_read(self, load, tmp_path) -> None:
        path = tmp_path / "a.csv"
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["text"], ["x" * 200_000]])
        assert load(path) == ["x" * 200_000]


def test_train_on_last_has_loss_on_the_last_answer_only(prepared, write_rows, tokenizer) -> None:
    path = write_rows("a.jsonl", [{"messages": [ASKED, SAID, ASKED, {**SAID, "content": "c"}]}])
    row = prepared("sft", [{"path": path}], sequence_length=256, train_on="last").sequence(0)
    assert tokenizer.decode(row.input_ids[row.is_target]) == "c<|im_end|>"


def test_suggested_fix_for_preferences_works(prepared, write_rows) -> None:
    turn = {"from": "human", "value": "Who?"}
    sides = {name: {"from": "gpt", "value": "It is me."} for name in ("chosen", "rejected")}
    path = write_rows("a.jsonl", [{"conversations": [turn], **sides}])
    with pytest.raises(
        UserError, match="preference rows: each row compares two answers"
    ) as message:
        prepared("sft", [{"path": path}])
    assert "{completion: chosen, prompt: NAME}" in message.value.fix
    columns = {"completion": "chosen", "prompt": "conversations"}
    source = {"path": path, "format": "prompt_completion", "columns": columns}
    assert prepared("sft", [source]).sequences_per_epoch == 1
