"""Tasks of lm-evaluation-harness are checked without torch and without the harness itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config import tasks
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserErrors
from tests.task_files import CHOICE, write_task


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))


def load(settings: str, *overrides: str) -> str:
    """The errors of `tiny` with these tasks."""
    try:
        load_recipe("tiny", [f"evaluation.tasks={settings}", *overrides])
    except UserErrors as error:
        return str(error)
    return ""


def test_an_unknown_task_names_the_nearest_ones(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "color_quiz")
    errors = load(f"{{names: [color_quizz, arc_esy, mmlu], include_path: {folder}}}")
    assert "names.0: lm-evaluation-harness has no task color_quizz" in errors
    assert "did you mean color_quiz" in errors and "arc_easy" in errors
    assert "names.2" not in errors
    assert (tmp_path / "cache" / "tasks").is_dir()  # the harness's files are read once
    assert "arc_easy" in load("{names: [arc_esy]}")


def test_a_name_alone_is_answered_with_the_group() -> None:
    assert "write tasks: {names: [mmlu]}" in load("mmlu")


def test_a_tag_has_no_score(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "quiz", f"tag: [quizzes, others]\n{CHOICE}")
    errors = load(f"{{names: [quizzes, others], include_path: {folder}}}")
    assert "quizzes is a tag" in errors and "others is a tag" in errors


def test_without_the_harness_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    errors = load("{names: [arc_easy]}")
    assert "is not installed" in errors and "pip install 'dtrain[lm-eval]'" in errors


@pytest.mark.parametrize(
    "line",
    [
        "process_docs: !function code.rows",
        "process_docs: !<!function> code.rows",
        "%TAG !e! !func\n---\nprocess_docs: !e!tion code.rows",
    ],
)
def test_python_code_in_task_files_needs_trust(tmp_path: Path, line: str) -> None:
    folder = write_task(tmp_path / "tasks", "quiz", CHOICE)
    (folder / "other.yaml").write_text(f"task: other\n# !function in a comment\n{line}\n")
    settings = f"names: [quiz], include_path: {folder}"
    errors = load(f"{{{settings}}}")
    assert f"{folder / 'other.yaml'}:3 runs Python code" in errors
    assert "trust_remote_code" in errors
    assert not load(f"{{{settings}, trust_remote_code: true}}")


def test_a_gate_can_name_a_task(tmp_path: Path) -> None:
    settings = f"{{names: [quiz], include_path: {write_task(tmp_path / 'tasks', 'quiz')}}}"
    assert not load(settings, "evaluation.gates={quiz: {max_drop: 0.1}}")
    errors = load(settings, "evaluation.gates={quizz: {max_drop: 0.1}}")
    assert "no set or task named quizz" in errors and "quiz" in errors


def test_names_are_not_shared_with_sets(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "domain")
    assert "both have this name" in load(f"{{names: [domain], include_path: {folder}}}")


def test_virtual_tokens_are_refused(tmp_path: Path) -> None:
    settings = f"{{names: [quiz], include_path: {write_task(tmp_path / 'tasks', 'quiz')}}}"
    errors = load(settings, "stages.task.method={kind: prompt}")
    assert "stages.1.method.kind and evaluation.tasks" in errors
