"""File names, lock, progress and exit report of a run folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dtrain.core import run_dir
from dtrain.core.errors import UserError
from dtrain.core.locks import FolderLock
from dtrain.core.run_dir import LOCKED_BY_LAUNCHER, RESERVED_NAMES, RunDir, create_numbered

ROOT = Path(run_dir.__file__).parents[1]
# Names that no other module may spell; the others are words that mean something else elsewhere.
NAMES = {
    *(run_dir.RECIPE, run_dir.LINEAGE, run_dir.EVALUATION, run_dir.HTML_REPORT),
    *(run_dir.EXIT_REPORT, run_dir.HEARTBEATS, run_dir.STAGE_RECORD, run_dir.METRICS),
    *(run_dir.MERGE_MANIFEST, "attempts.json", "jobs.json"),
}


def test_only_run_dir_names_files_of_a_run_folder() -> None:
    for file in ROOT.rglob("*.py"):
        if file != Path(run_dir.__file__):
            tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            words = {node.value for node in tree if isinstance(node, ast.Constant)}
            assert not words & NAMES, file


def test_every_file_of_the_folder_is_reserved() -> None:
    paths = {name: getattr(RunDir(Path("run")), name) for name in dir(RunDir)}
    files = {p.name for p in paths.values() if isinstance(p, Path) and p.parent == Path("run")}
    files.add(RunDir(Path("run")).predictions("base").parent.name)
    assert files - {run_dir.HEARTBEATS} == RESERVED_NAMES  # a stage's name begins with a letter


def test_second_run_is_refused_unless_its_launcher_holds_the_lock(tmp_path, monkeypatch) -> None:
    run = RunDir(tmp_path / "run")
    lock = run.lock()
    with pytest.raises(UserError, match=r"another run is using this folder \(process"):
        run.lock()
    monkeypatch.setenv(LOCKED_BY_LAUNCHER, str(run.path))
    run.lock()
    lock.release()
    assert FolderLock(run.path).acquire()


def test_run_folder_path_that_is_a_file_is_a_user_error(tmp_path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="cannot be used as the run folder"):
        RunDir(tmp_path / "run").lock()
    assert create_numbered(tmp_path / "run").path == tmp_path / "run-2"


def test_folder_writable_by_others_is_refused(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(UserError, match="anyone may write to it"):
        RunDir(tmp_path / "run").lock()


def test_reset_clears_files_of_the_last_start(tmp_path) -> None:
    run = RunDir(tmp_path)
    run.stop.touch()
    run.exit_report.write_text("{}")
    run.reset("name: new\n")
    assert run.recipe.read_text() == "name: new\n"
    assert not run.stop.exists() and not run.exit_report.exists()


def test_progress_of_each_stage(tmp_path) -> None:
    run = RunDir(tmp_path)
    for name, record in (("a", '{"complete": true}'), ("b", "{damaged"), ("c", "{}")):
        run.stage(name).path.mkdir()
        run.stage(name).record.write_text(record)
    for step in ("step-000020", "step-1000000"):
        folder = run.stage("b").checkpoints / step
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (run.stage("b").checkpoints / "step-2000000").mkdir()  # its manifest is missing
    assert run.progress() == {"a": "complete", "b": "step-1000000", "c": "started"}
