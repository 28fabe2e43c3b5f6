"""Every format is read, and every error names its file and line."""

from __future__ import annotations

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrain.config.data import Source
from dtrain.core.errors import UserError
from dtrain.data.conversations import Conversation
from dtrain.data.records import read_records
from dtrain.data.sources import find_source_files

QUESTION = {"role": "user", "content": "a"}


@pytest.fixture
def load(tmp_path):
    """load(path, format) → [(text or messages or pair, place), …]"""

    def plain(value):
        return value.messages if isinstance(value, Conversation) else value

    def run(path, form="text", **more):
        source_files = find_source_files(
            Source(path=str(path), format=form, **more), tmp_path / "cache"
        )
        rows = read_records(source_files, form, more.get("columns"))
        return [
            (plain(row.value), source_files[row.file_index].location(row.row_number))
            for row in rows
        ]

    return run


@pytest.fixture
def fault(load):
    """fault(path, format) → the message."""

    def run(path, form="text", **more):
        with pytest.raises(UserError) as error:
            load(path, form, **more)
        return str(error.value)

    return run


def test_text_file_is_one_document(load, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    assert load(tmp_path / "a.txt") == [("one\n\ntwo\n", str(tmp_path / "a.txt"))]


def test_line_numbers_count_blank_lines(load, write_rows, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n{"text": "y", "more": 1}')
    assert load(path) == [("x", f"{path}:1"), ("y", f"{path}:3")]


def test_json_list_and_json_lines_are_read(load, tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x"}, {"text": "y"}], indent=1))
    assert load(path) == [("x", f"{path}#1"), ("y", f"{path}#2")]
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [value for value, _ in load(path)] == ["x", "y"]


def test_parquet_is_read(load, tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(2500)], "other": [0] * 2500}), path)
    rows = load(path)
    assert [value for value, _ in rows] == [str(i) for i in range(2500)]
    assert rows[-1][1] == f"{path}#2500"


def test_messages_from_parquet_equal_those_from_json(load, write_rows, tmp_path) -> None:
    rows = [{"messages": [QUESTION, {"role": "assistant", "content": "b"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = write_rows("a.jsonl", rows)
    assert load(tmp_path / "a.parquet", "messages")[0][0] == load(path, "messages")[0][0]


def test_alpaca_rows_become_conversations(load, write_rows) -> None:
    path = write_rows(
        "a.jsonl",
        [
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            {"instruction": "Hi.", "output": "Hello."},
            {"instruction": "Hi.", "input": None, "output": "Hello."},
        ],
    )
    first, second, third = (value for value, _ in load(path, "alpaca"))
    assert [m["content"] for m in first] == ["Add.\n\n1 1", "2"]
    assert [m["content"] for m in second] == ["Hi.", "Hello."]
    assert second == third


def test_globs_and_folders_are_read_in_name_order(load, write_rows, tmp_path) -> None:
    for name in ("c/b.jsonl", "c/a.jsonl", "c/deep/d.jsonl"):
        write_rows(name, [{"text": name}])
    (tmp_path / "c" / "README.html").write_text("not data")
    assert [v for v, _ in load(tmp_path / "c" / "*.jsonl")] == ["c/a.jsonl", "c/b.jsonl"]
    assert [v for v, _ in load(tmp_path / "c")] == ["c/a.jsonl", "c/b.jsonl", "c/deep/d.jsonl"]
    deep = load(tmp_path / "c" / "**" / "*.jsonl")
    assert sorted(v for v, _ in deep) == ["c/a.jsonl", "c/b.jsonl", "c/deep/d.jsonl"]


def test_sample_addresses_are_resolved(load, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path))
    (tmp_path / "samples" / "words").mkdir(parents=True)
    (tmp_path / "samples" / "words" / "a.txt").write_text("hello")
    assert load("dtrain:words/a.txt")[0][0] == "hello"


def test_save_to_disk_folder_is_read(load, fault, tmp_path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "id": [1, 2]})
    rows.save_to_disk(str(tmp_path / "one"))
    assert load(tmp_path / "one") == [("x", f"{tmp_path}/one#1"), ("y", f"{tmp_path}/one#2")]
    both = datasets.DatasetDict(train=rows, test=rows.select([1]))
    both.save_to_disk(str(tmp_path / "two"))
    assert [v for v, _ in load(tmp_path / "two", split="test")] == ["y"]
    assert "set `split` to one of train, test" in fault(tmp_path / "two", split="dev")
    assert "column `instruction` is missing" in fault(tmp_path / "one", "alpaca")


def test_hub_dataset_is_read(load, monkeypatch) -> None:
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("org/corpus", split="test") == [("x", "org/corpus[test]#1")]
    assert asked == [("org/corpus", "test")]


def test_unknown_hub_id_is_reported(fault, monkeypatch) -> None:
    def load_dataset(path, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = fault("corpus")
    assert "no such file or folder, and not on the hub: no route" in message


def test_a_slip_in_a_local_name_is_not_asked_of_the_hub(fault, tmp_path, monkeypatch) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert fault("doc").startswith("doc: no such file or folder\n    → did you mean docs?")


def test_missing_files_are_reported(fault, tmp_path) -> None:
    assert "a.jsonl: no such file" in fault(tmp_path / "a.jsonl")
    assert "no readable files here" in fault(tmp_path / "*.jsonl")
    (tmp_path / "empty").mkdir()
    assert "no readable files here" in fault(tmp_path / "empty")


def test_unknown_file_type_is_refused(fault, tmp_path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    assert "unknown file type: .xlsx" in fault(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"text": "a"}\n{"text": "b\n', 2, "invalid JSON: Invalid control character"),
        (b'{"text": "a"}\n\n{"text"}\n', 3, "invalid JSON: Expecting ':' delimiter (column 8)"),
        (b'{"text": "a"}\n{"text":\n', 2, "invalid JSON: Expecting value"),
        (b'{"text": "a"}\n{"text" \r\n', 2, "invalid JSON: Expecting ':' delimiter (column 8)"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not UTF-8"),
        (b'{"text": "a"}\n["b"]\n', 2, "a row must be an object, not a list"),
        (b'{"text": "a"}\n{"txt": "b"}\n', 2, "column `text` is missing; the row has txt"),
        (b'{"text": "a"}\n{"text": null}\n', 2, "`text` must be a text, not null"),
        (b'{"text": 1}\n', 1, "`text` must be a text, not a number"),
        (b'{"text": "\\ud800"}\n', 1, "`text` contains an unpaired surrogate"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", 1, "JSON nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", 1, "invalid JSON: Exceeds the limit"),
    ],
)
def test_invalid_lines_are_reported_with_their_number(
    fault, tmp_path, content, line, message
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert fault(tmp_path / "a.jsonl").startswith(f"{tmp_path}/a.jsonl:{line}: {message}")


def test_what_is_no_file_is_not_read(fault, tmp_path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")  # would wait for a writer
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    for name in ("a.jsonl", "b.jsonl"):
        assert "is not a file" in fault(tmp_path / name)
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    assert "no readable files here" in fault(tmp_path / "[ab].jsonl")


def test_a_packed_file_that_would_fill_the_memory_is_refused(fault, tmp_path) -> None:
    with gzip.open(tmp_path / "a.json.gz", "wb") as file:
        file.write(b"[" + b" " * (1 << 26))
    assert "expands to more than 200 times its size" in fault(tmp_path / "a.json.gz")


def test_truncated_json_list_is_reported_with_its_line(fault, tmp_path) -> None:
    (tmp_path / "a.json").write_text('[\n {"text": "a"},\n {"text" "b"}\n]')
    assert f"{tmp_path}/a.json:3: invalid JSON" in fault(tmp_path / "a.json")


def test_corrupt_parquet_file_is_reported(fault, tmp_path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert "a.parquet#1: invalid parquet file" in fault(tmp_path / "a.parquet")


def test_missing_column_is_reported_with_existing_columns(fault, write_rows, tmp_path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    message = fault(tmp_path / "a.parquet")
    assert "column `text` is missing; the row has body" in message
    path = write_rows("a.jsonl", [{"instruction": "x", "answer": "y"}])
    message = fault(path, "alpaca")
    assert f"{path}:1: column `output` is missing; the row has instruction, answer" in message
    assert "format: alpaca needs instruction, output" in message


@pytest.mark.parametrize("value", [True, -1, 1.5, "x", {"a": "b"}])
def test_a_column_of_the_wrong_type_is_named(fault, write_rows, value) -> None:
    row = {"instruction": "x", "output": "y", "history": value}
    assert ":1: `history" in fault(write_rows("a.jsonl", [row]), "alpaca")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "`messages` must be a list of messages, not a text"),
        ([], "`messages` must be a list of messages, not an empty list"),
        (["hello"], "`messages[0]` must be an object, not a text"),
        ([QUESTION, {"role": "user"}], "`messages[1]` has no `content`"),
        ([QUESTION, {"role": 1, "content": "x"}], "`messages[1].role` must be a text"),
        ([{"role": "user", "content": []}], "`messages[0].content` must be a text, not a list"),
    ],
)
def test_invalid_messages_are_reported(fault, write_rows, messages, message) -> None:
    path = write_rows("a.jsonl", [{"messages": messages}])
    assert fault(path, "messages").startswith(f"{path}:1: {message}")


def test_text_file_has_no_conversations(fault, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert "a .txt file contains plain text, not rows of alpaca" in fault(
        tmp_path / "a.txt", "alpaca"
    )


def test_text_file_that_is_not_utf8_is_refused(fault, tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt:1: is not UTF-8 text (byte 0xe9)" in fault(tmp_path / "a.txt")
