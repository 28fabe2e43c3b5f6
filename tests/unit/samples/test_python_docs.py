"""The corpus of Python's documentation: nothing held out is trained on, and all is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.core.hashes import file_hash
from dtrain.samples import python_docs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("python-docs")
    python_docs.make(built)
    return built


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_files_are_written_twice(folder: Path, tmp_path: Path) -> None:
    python_docs.make(tmp_path)
    for path in folder.iterdir():
        assert file_hash(path) == file_hash(tmp_path / path.name), path.name


def test_a_package_is_in_one_split_only(folder: Path) -> None:
    sides = [
        {row["module"].split(".")[0] for row in _lines(folder / f"domain-{side}.jsonl")}
        for side in ("train", "heldout")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_no_held_out_text_or_answer_was_trained_on(folder: Path) -> None:
    trained = {row["text"] for row in _lines(folder / "domain-train.jsonl")}
    assert not trained & {row["text"] for row in _lines(folder / "domain-heldout.jsonl")}
    rows, held = (
        json.loads((folder / f"task-{side}.json").read_text()) for side in ("train", "heldout")
    )
    assert not {r["instruction"] for r in rows} & {r["instruction"] for r in held}
    sentences = {r["output"] for r in rows if r["instruction"].startswith("What does")}
    assert not sentences & {r["output"] for r in held if r["instruction"].startswith("What does")}


def test_counts_match_the_files(folder: Path) -> None:
    counts = json.loads((folder / "counts.json").read_text())
    for name in ("domain-train", "domain-heldout", "domain-heldout-small"):
        assert counts[name] == len(_lines(folder / f"{name}.jsonl"))
    for name in ("task-train", "task-heldout", "task-heldout-small"):
        assert counts[name] == len(json.loads((folder / f"{name}.json").read_text()))
        assert counts[name] == sum(counts["kinds"][name].values())
    assert counts["general"] == len(_lines(folder / "general.jsonl")) > 0
    assert counts["task-train"] > 5000 and counts["task-heldout"] > 500


def test_small_files_are_subsets_of_the_held_out_files(folder: Path) -> None:
    small, all_held = (_lines(folder / f"domain-heldout{end}.jsonl") for end in ("-small", ""))
    assert all(row in all_held for row in small)
    characters = sum(len(row["text"]) for row in small)
    assert 0.9 * python_docs.SMALL_CHARACTERS < characters <= python_docs.SMALL_CHARACTERS


def test_the_first_questions_are_of_different_kinds(folder: Path) -> None:
    asked = [row["question"] for row in _lines(folder / "questions.jsonl")[:3]]
    assert asked[0].startswith("What does")
    assert "these words" in asked[1] and asked[2].startswith("How is")


def test_a_rejected_answer_is_plausible_and_wrong(folder: Path) -> None:
    files = ("pairs-train", "pairs-heldout", "pairs-heldout-small")
    train, held, small = (json.loads((folder / f"{name}.json").read_text()) for name in files)
    tasks = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("task-train", "task-heldout")
    }
    for pairs, task in ((train, tasks["task-train"]), (held, tasks["task-heldout"])):
        right = {(row["instruction"], row["output"]) for row in task}
        answers = {row["output"] for row in task}
        assert len(pairs) > 0.8 * len(task)
        for row in pairs:
            assert (row["prompt"], row["chosen"]) in right
            assert row["rejected"] != row["chosen"]
            if row["prompt"].startswith("How is"):  # the same name, called in another way
                name = row["chosen"].split("(")[0]
                assert row["rejected"].startswith(f"{name}(")
            else:
                assert row["rejected"] in answers
    assert small == held[: python_docs.SMALL_PAIRS]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
