"""File names, lock, progress and exit report of a run folder."""

from __future__ import annotations

import ast
import os
import socket
from pathlib import Path

import pytest

from dtrain.core import run_dir, stage_dir
from dtrain.core.errors import UserError
from dtrain.core.locks import FolderLock
from dtrain.core.run_dir import (
    LOCKED_BY_LAUNCHER,
    RESERVED_NAMES,
    RunDir,
    create_numbered,
    read_exit_report,
)

ROOT = Path(run_dir.__file__).parents[1]
# Names that no other module may spell; the others are words that mean something else elsewhere.
NAMES = {
    *(run_dir.RECIPE, run_dir.LINEAGE, run_dir.EVALUATION, run_dir.HTML_REPORT),
    *(run_dir.EXIT_REPORT, run_dir.HEARTBEATS, stage_dir.STAGE_RECORD, stage_dir.METRICS),
    *(stage_dir.MERGE_MANIFEST, "attempts.json", "jobs.json"),
}


def test_only_two_modules_name_files_of_a_run_folder() -> None:
    for file in ROOT.rglob("*.py"):
        if file not in {Path(run_dir.__file__), Path(stage_dir.__file__)}:
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


def test_a_first_start_clears_files_of_the_last(tmp_path) -> None:
    run = RunDir(tmp_path)
    run.stop.touch()
    run.exit_report.write_text("{}")
    run.request("name: new\n")
    assert run.start_recipe == run.recipe and run.recipe.read_text() == "name: new\n"
    assert not run.stop.exists() and not run.exit_report.exists()


def test_a_start_of_a_run_with_stages_changes_nothing_until_it_is_accepted(tmp_path) -> None:
    run = RunDir(tmp_path)
    run.request("name: old\n")
    run.exit_report.write_text('{"outcome": "finished"}')
    run.stage("domain").path.mkdir()
    run.stage("domain").record.write_text("{}")
    run.stop.touch()
    run.request("name: new\n")
    assert run.recipe.read_text() == "name: old\n" and not run.stop.exists()
    assert run.start_recipe.read_text() == "name: new\n"
    assert run.read_exit_report() == {}  # not that of the start before
    run.start_exit_report.write_text('{"outcome": "failed"}')
    assert run.read_exit_report() == {"outcome": "failed"}
    assert run.exit_report.read_text() == '{"outcome": "finished"}'
    run.request("name: newer\n")
    assert run.read_exit_report() == {}
    run.accept("name: newer\n")
    assert run.start_recipe == run.recipe and run.recipe.read_text() == "name: newer\n"
    assert run.read_exit_report() == {} and not run.exit_report.exists()


def test_the_holder_of_a_lock_is_a_process_that_has_it_open(tmp_path) -> None:
    run = RunDir(tmp_path / "run")
    lock = run.lock()
    assert FolderLock(run.path).is_held() and FolderLock(run.path).holder_here() == os.getpid()
    lock.release()
    asked = FolderLock(run.path)
    assert not asked.is_held() and asked.holder_here() is None  # the file still names a process
    other = FolderLock(run.path)
    assert other.acquire()
    (run.path / ".lock").write_text("process 1 on " + socket.gethostname() + "\n")
    assert asked.is_held() and asked.holder_here() is None


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


def test_exit_report_that_a_new_start_removes_is_none(tmp_path, monkeypatch) -> None:
    """`dtrain status` of a run that starts again would call it failed."""
    monkeypatch.setattr(Path, "exists", lambda self: True)  # until it is opened
    assert read_exit_report(tmp_path / "outcome.json") == {}
