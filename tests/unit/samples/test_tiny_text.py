"""The data of the recipe `tiny`: golden losses stand on it too."""

from __future__ import annotations

import json
from pathlib import Path

from dtrain.core.hashes import file_hash, fingerprint
from dtrain.samples import tiny_text

FILES_HASH = "bc4bf3a600c104ef2844787982c1c14f33aa84533682d1bc30f64dfe9eb479bc"


def test_files_match_the_known_hashes(tmp_path: Path) -> None:
    tiny_text.make(tmp_path)
    hashes = {path.name: file_hash(path) for path in tmp_path.iterdir()}
    assert set(hashes) == {
        "domain.jsonl",
        "domain-heldout.jsonl",
        "task.json",
        "task-heldout.json",
        "questions.jsonl",
    }
    assert fingerprint(hashes) == FILES_HASH


def test_answers_follow_from_the_sentence(tmp_path: Path) -> None:
    tiny_text.make(tmp_path)
    rows = json.loads((tmp_path / "task.json").read_text())
    for row in rows:
        subject, _, claim = row["output"].rstrip(".").partition(" is ")
        assert claim in row["instruction"]
        assert subject.removeprefix("The ") in row["instruction"]
