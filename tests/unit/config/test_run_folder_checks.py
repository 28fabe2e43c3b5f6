"""A run folder inside the data is refused before anything is written."""

from __future__ import annotations

import glob
import json
from pathlib import Path

import pytest

from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError


def load(source: str, folder: str) -> None:
    source = json.dumps({"path": source, "format": "text"})
    load_recipe("tiny", [f"stages.domain.data.sources=[{source}]", f"output.folder={folder}"])


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("data", "data/run"),
        ("data", "data"),
        (".", "runs/tiny"),
        ("data/**/*.jsonl", "data/run"),
        ("data/*/*.json", "data/run"),
        ("data/run/*.jsonl", "data/run"),
        ("data/../data/**/*.js*", "./data/a/../run"),
        ("{}/data/**", "data/run"),
        ("data/*/domain/metrics.jsonl", "data/run"),
    ],
)
def test_a_run_folder_inside_the_data_is_refused(source, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"(?s)the run would write .* output\.folder outside"):
        load(source.format(tmp_path), folder)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("data/*.jsonl", "data/run"),  # only the folder itself
        ("data/**/*.txt", "data/run"),
        ("data", "data-runs"),
        ("data", "data/.runs/a"),  # hidden folders are skipped
        ("data/**/*.jsonl", "data/.runs/a"),
        ("https://host/data", "data/run"),
        ("data/rows.jsonl", "data"),
    ],
)
def test_a_run_folder_beside_the_rows_is_accepted(source, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    load(source, folder)


def test_globs_are_understood_as_the_reader_does(tmp_path: Path) -> None:
    from dtrain.config.run_folder_checks import _matches

    names = ["a.jsonl", "b/a.jsonl", "b/c/a.json", ".h/a.jsonl", "b/.h/a.jsonl", "b/x.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for text in ("*", "**", "**/*", "*/*", "**/*.jsonl", "b/**", "[ab]/**/*.js*", ".h/*", "**/c/*"):
        pattern = tmp_path / text
        found = {str(Path(p)) for p in glob.glob(str(pattern), recursive=True) if Path(p).is_file()}
        mine = {str(tmp_path / n) for n in names if _matches(pattern.parts, (tmp_path / n).parts)}
        assert mine == found, text
