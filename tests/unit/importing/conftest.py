"""A folder with configs of other tools, and the data that they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).with_name("configs")
QUESTIONS = [f"What is {n} and {n}?" for n in range(12)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_data(folder: Path) -> None:
    """Rows of every format that the configs name."""
    folder.mkdir(exist_ok=True)
    turns = [
        [{"from": "human", "value": q}, {"from": "gpt", "value": f"It is {2 * n}."}]
        for n, q in enumerate(QUESTIONS)
    ]
    pairs = [(q, f"It is {2 * n}.", f"It is {n}.") for n, q in enumerate(QUESTIONS)]
    tables = {
        "alpaca": [{"instruction": q, "input": "", "output": good} for q, good, _ in pairs],
        "qa": [{"question": q, "answer": good} for q, good, _ in pairs],
        "chats": [{"turns": talk, "conversations": talk} for talk in turns],
        "chats-heldout": [{"turns": talk} for talk in turns[:4]],
        "pairs": [{"question": q, "chosen": good, "rejected": bad} for q, good, bad in pairs],
        "own-pairs": [{"question": q, "good": good, "bad": bad} for q, good, bad in pairs],
        "own": [{"prompt": q, "chosen": good, "rejected": bad} for q, good, bad in pairs],
        "rated": [{"turns": talk, "good": n % 2 == 0} for n, talk in enumerate(turns)],
        "texts": [{"content": f"{q} {good} " * 4} for q, good, _ in pairs],
    }
    for name, rows in tables.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "more.txt").write_text("\n\n".join(QUESTIONS * 4), "utf-8")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `axolotl/`, `llama_factory/`, `trl/`, and `data/` for all of them."""
    shutil.copytree(CONFIGS, tmp_path, dirs_exist_ok=True)
    write_data(tmp_path / "data")
    write_data(tmp_path / "llama_factory" / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path
