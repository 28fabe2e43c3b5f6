"""Readers of source files: nulls, byte-order marks, columns, rows inside an object."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrain.config.data import Source
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.data.chat_templates import template_text
from dtrain.data.conversations import Conversation
from dtrain.data.records import BadRecord, iter_records, read_records
from dtrain.data.sources import find_source_files
from dtrain.models.tokenizer import load_tokenizer
from dtrain.serving.generate import Prompt, read_prompts

ASKED = {"role": "user", "content": "a"}
SCHEMA = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"unit": {"type": "string", "default": None, "enum": ["C", None]}},
        "const": None,
    },
}
TOOLS = [{"type": "function", "function": SCHEMA}]


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }


@pytest.fixture
def load(tmp_path):
    """load(path) → the values of all rows"""

    def run(path: Path, form: str = "auto", **more: Any) -> list[Any]:
        source = Source(path=str(path), format=form, **more)
        source_files = find_source_files(source, tmp_path / "cache")
        return [record.value for record in read_records(source_files, form, source.columns)]

    return run


@pytest.fixture
def fault(load):
    """fault(path) → the message"""

    def run(path: Path, form: str = "auto", **more: Any) -> str:
        with pytest.raises(UserError) as error:
            load(path, form, **more)
        return str(error.value)

    return run


def arguments_of(talk: Conversation) -> Any:
    return talk.messages[1]["tool_calls"][0]["function"]["arguments"]


ARGUMENTS = {"unit": None, "deep": {"none": None, "list": [None, {"x": None}]}}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
@pytest.mark.parametrize("as_text", [False, True])
def test_json_nulls_in_schemas_and_arguments_are_kept(load, tmp_path, suffix, as_text) -> None:
    written = json.dumps if as_text else lambda value: value
    row = {"messages": [ASKED, call(written(ARGUMENTS))], "tools": written(TOOLS)}
    content = json.dumps([row] if suffix == ".json" else row).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    (talk,) = load(path)
    assert arguments_of(talk) == ARGUMENTS
    assert talk.tools == TOOLS


def arrow_file(path: Path, rows: list[Any]) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "saved"])
def test_only_nulls_added_by_arrow_are_removed(load, tmp_path, name) -> None:
    rows = [
        {"messages": [ASKED, call({"city": "Paris", "list": [None, "x"]})], "tools": None},
        {
            "messages": [ASKED, call({"unit": "C"})],
            "tools": [{"name": "f", "properties": {"a": 1}}],
        },
    ]
    first, second = load(arrow_file(tmp_path / name, rows))
    assert arguments_of(first) == {"city": "Paris", "list": [None, "x"]}
    assert arguments_of(second) == {"unit": "C"}
    assert first.tools is None
    assert second.tools[0]["function"] == {"name": "f", "properties": {"a": 1}}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "saved"])
def test_nulls_in_json_strings_of_arrow_are_kept(load, tmp_path, name) -> None:
    row = {"messages": [ASKED, call(json.dumps(ARGUMENTS))], "tools": json.dumps(TOOLS)}
    (talk,) = load(arrow_file(tmp_path / name, [row]))
    assert arguments_of(talk) == ARGUMENTS and talk.tools == TOOLS


def test_a_duplicate_key_in_a_row_is_refused(load, fault, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n')
    assert fault(path).startswith(f"{path}:1: duplicate key `content`")
    row = {"messages": [ASKED, call('{"a": 1, "a": 2}')]}
    path.write_text(json.dumps(row))
    assert "the key a occurs twice" in fault(path)


BOM = "\ufeff"
ROWS = {
    "a.jsonl": '{"text": "x"}\n',
    "a.json": '[{"text": "x"}]',
    "b.json": '{"text": "x"}\n{"text": "x"}\n',
    "c.json": '{"data": [\n{"text": "x"}]}',
    "a.csv": "text\nx\n",
    "a.txt": "x",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_byte_order_mark_is_removed_from_rows(load, fault, tmp_path, name, packed) -> None:
    path = tmp_path / (name + ".gz" * packed)

    def write(content: bytes) -> None:
        path.write_bytes(gzip.compress(content) if packed else content)

    write((BOM + ROWS[name]).encode())
    assert set(load(path)) == {"x"}
    for encoding in ("utf-16", "utf-32"):
        write(ROWS[name].encode(encoding))
        assert "is UTF-16 text, not UTF-8" in fault(path) and "iconv" in fault(path)


def test_file_with_only_a_byte_order_mark_has_no_rows(load, tmp_path) -> None:
    for name in ("a.jsonl", "a.csv", "a.txt", "a.json"):
        (tmp_path / name).write_text(BOM, encoding="utf-8")
        assert load(tmp_path / name, "text") == []


def test_byte_order_mark_is_removed_from_template_files(tokenizer, tmp_path) -> None:
    path = tmp_path / "a.jinja"
    path.write_text(BOM + "{{ messages[0].content }}", encoding="utf-8")
    assert template_text(str(path), tokenizer) == "{{ messages[0].content }}"
    path.write_bytes("{{ x }}".encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16 text") as error:
        template_text(str(path), tokenizer)
    assert "iconv" in error.value.fix


@pytest.mark.parametrize("named", [False, True])
def test_byte_order_mark_is_removed_from_tokenizer_templates(
    make_tokenizer, tmp_path, named
) -> None:
    make_tokenizer(template=BOM + "{{ 1 }}").save_pretrained(tmp_path)
    if named:  # several templates, as older models keep them
        (tmp_path / "chat_template.jinja").unlink()
        path = tmp_path / "tokenizer_config.json"
        several = [{"name": n, "template": BOM + "{{ 1 }}"} for n in ("default", "rag")]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))
    tokenizer = load_tokenizer(tmp_path)
    assert template_text("auto", tokenizer) == "{{ 1 }}"
    assert BOM not in str(tokenizer.chat_template)


def test_byte_order_mark_is_removed_from_prompts(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(BOM + '{"question": "a\u2028b", "answer": "c"}\n', encoding="utf-8")
    (prompt,) = read_prompts(path)
    assert isinstance(prompt, Prompt) and prompt.messages[0]["content"] == "a\u2028b"
    path.write_bytes(codecs.BOM_UTF16_LE)
    with pytest.raises(UserError, match="is UTF-16 text"):
        list(read_prompts(path))


def test_byte_order_mark_is_removed_from_recipes_and_deepspeed_files(tmp_path) -> None:
    recipe, deepspeed = tmp_path / "a.yaml", tmp_path / "ds.json"
    known = Path("ds_configs/zero2.json").read_text(encoding="utf-8")
    deepspeed.write_text(BOM + known, encoding="utf-8")
    shipped = Path("dtrain/recipes/tiny.yaml").read_text(encoding="utf-8")
    recipe.write_text(BOM + shipped, encoding="utf-8")
    overrides = ["engine.kind=zero2", f"engine.config={deepspeed}"]
    assert load_recipe(str(recipe), overrides) == load_recipe("tiny", overrides)
    deepspeed.write_bytes(known.encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16 text"):
        load_recipe("tiny", overrides)


@pytest.mark.parametrize("head", ["text,text", "a,text,b,text"])
def test_a_duplicate_column_is_refused(fault, tmp_path, head) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{head}\n" + ",".join("x" for _ in head.split(",")) + "\n")
    assert fault(path).startswith(f"{path}:1: duplicate column `text`")


def test_unnamed_columns_are_ignored(load, tmp_path) -> None:
    """As spreadsheets leave behind their last column."""
    (tmp_path / "a.csv").write_text("text,,\nx,,\n")
    assert load(tmp_path / "a.csv", "text") == ["x"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_duplicate_column_in_an_arrow_file_is_refused(fault, tmp_path, suffix) -> None:
    path = tmp_path / f"a{suffix}"
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    assert "duplicate column `text`" in fault(path)


def test_a_csv_row_of_another_length_is_refused_with_its_line(tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,b\n"two\nlines",1\nx\nx,1,2\ny,1\n')
    source_files = find_source_files(Source(path=str(path)), tmp_path / "cache")
    values = [
        str(item.error) if isinstance(item, BadRecord) else item
        for item in iter_records(source_files, "text")
    ]
    assert values[1].startswith(f"{path}:4: 1 cells, but the header has 2 columns")
    assert values[2].startswith(f"{path}:5: 3 cells")
    assert values[0].value == "two\nlines" and values[3].value == "y"


ROW = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key", ["data", "rows", "train", "anything"])
def test_rows_inside_an_object_are_read(load, tmp_path, key, indent) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1", key: [ROW, ROW], "n": [1]}, indent=indent))
    assert [talk.messages[1]["content"] for talk in load(path)] == ["a", "a"]
    assert len(load(path, "alpaca")) == 2


@pytest.mark.parametrize("indent", [None, 1])
def test_single_object_is_one_row(load, tmp_path, indent) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"id": 1, "messages": [ASKED, ASKED]}, indent=indent))
    assert [len(talk.messages) for talk in load(path)] == [2]
    path.write_text(json.dumps({"turns": [ASKED, ASKED, ASKED]}, indent=indent))
    for form in ("auto", "messages"):
        (talk,) = load(path, form, columns={"messages": "turns"})
        assert len(talk.messages) == 3


def test_an_object_with_rows_under_several_keys_is_refused(fault, tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": [ROW], "test": [ROW]}))
    assert fault(path).startswith(f"{path}: several keys contain rows: train, test")
    path.write_text(json.dumps({"a": 1}))
    assert "no known format has the columns a" in fault(path)


def test_error_in_one_row_of_a_list_keeps_the_other_rows(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "x"}, {"text": 1, "a": [{"b": 1, "b": 2}]}, {"text": "y"}]')
    source_files = find_source_files(Source(path=str(path)), tmp_path / "cache")
    values = [
        str(i.error) if isinstance(i, BadRecord) else i.value
        for i in iter_records(source_files, "text")
    ]
    assert values[0] == "x" and values[2] == "y"
    assert values[1].startswith(f"{path}#2: duplicate key `b`")
