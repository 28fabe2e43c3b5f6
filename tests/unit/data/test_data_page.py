"""The rows that dtrain/recipes/DATA.md shows are of the formats that it names."""

from __future__ import annotations

import json
import re

import pytest

from dtrain.config.objectives import OBJECTIVES, format_mismatch
from dtrain.data.conversations import Conversation
from dtrain.data.formats import ROW_FORMATS, convert_row, detect_format, to_row
from dtrain.recipes import FOLDER

PAGE = (FOLDER / "DATA.md").read_text(encoding="utf-8")
ROWS = [
    (name, json.loads(line))
    for name, lines in re.findall(r"```jsonl (\w+)\n(.*?)```", PAGE, re.DOTALL)
    for line in lines.splitlines()
]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_row_is_of_its_format(name: str, row: dict[str, object]) -> None:
    assert detect_format(row, {}, "DATA.md") == name
    value = convert_row(row, name, {}, "DATA.md")
    again = to_row(value)
    assert convert_row(again, detect_format(again, {}, ""), {}, "") == value


def test_every_format_has_a_row_and_its_objectives_are_named() -> None:
    assert {name for name, _ in ROWS} == ROW_FORMATS.keys()
    texts = {
        name: PAGE[: PAGE.index(f"```jsonl {name}")].rpartition("\n**")[2] for name in ROW_FORMATS
    }
    for name, text in texts.items():
        for kind in set(re.findall(r"`(\w+)`", text)) & OBJECTIVES.keys():
            assert format_mismatch(kind, name) is None, (kind, name)


def test_rows_show_tools_reasoning_several_turns_and_loss() -> None:
    conversations = [convert_row(row, name, {}, "") for name, row in ROWS if name == "messages"]
    messages = [m for c in conversations if isinstance(c, Conversation) for m in c.messages]
    assert any(c.tools for c in conversations if isinstance(c, Conversation))
    assert any("reasoning_content" in m for m in messages)
    assert any(m.get("train") is False for m in messages)
    assert any(len(c.messages) > 4 for c in conversations if isinstance(c, Conversation))
