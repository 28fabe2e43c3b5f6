"""The command `dtrain` as a user meets it: in a process of its own."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.config.load import load_recipe
from dtrain.core.errors import Exit
from dtrain.recipes import shipped

HEAVY = {"torch", "transformers", "peft", "datasets", "deepspeed", "accelerate", "numpy"}
IMPORTS = """
import sys
from dtrain.cli import main
try:
    sys.exit(main())
finally:
    print("MODULES", *sorted(name for name in sys.modules if "." not in name))
"""


def dtrain(*arguments: str, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "dtrain"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["check", "tiny"],
        ["plan", "7b-lora"],
        ["recipes"],
        ["recipes", "copy", "tiny"],
    ],
    ids=" ".join,
)
def test_login_node_commands_import_no_torch(arguments: list[str], tmp_path: Path) -> None:
    done = dtrain(*arguments, cwd=tmp_path, code=IMPORTS)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.rpartition("MODULES")[2].split())
    assert "typer" in modules and not modules & HEAVY


OPEN = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
CLOSED = OPEN.replace("m.content", "m.content + eos_token")


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        (OPEN, "the end of a turn has no loss: the model will not learn to stop"),
        (CLOSED, ""),
        ("{% generation %}" + OPEN + "{% endgeneration %}", "the end of a turn has no loss"),
        ("{{ raise_exception('no') }}", "not checked here; `dtrain data scan`"),
    ],
)
def test_check_warns_about_a_template_without_end_of_turn(
    tmp_path: Path, template, warning
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    setting = "stages.task.data.template=own.jinja"
    done = dtrain("check", "tiny", setting, cwd=tmp_path, code=IMPORTS)
    assert done.returncode == 0 and warning in done.stderr
    assert bool(warning) == ("own.jinja" in done.stderr)
    assert not set(done.stdout.rpartition("MODULES")[2].split()) & HEAVY


@pytest.mark.parametrize("verb", ["check", "run", "submit"])
def test_a_later_stage_is_checked_before_anything_is_written(verb: str, tmp_path: Path) -> None:
    faults = [
        "stages.task.method.target_modules=[q_prj]",
        "stages.task.data.sources=[{path: no.jsonl}]",
        "evaluation.generation={asked: {path: no.csv}}",
    ]
    done = dtrain(verb, "tiny", *faults, cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    message = "stages.task.method.target_modules: no linear layer is named 'q_prj'"
    assert f"override {faults[0]}: {message}" in done.stderr
    assert "stages.task.data: no.jsonl: no such file" in done.stderr
    assert "evaluation.generation.asked.path: no.csv: no such file" in done.stderr


def test_a_job_is_not_submitted_before_its_base_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    fix = "dtrain model fetch meta-llama/Llama-3.1-70B"
    done = dtrain("submit", "70b-qlora", "--nodes", "2", cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert "Llama-3.1-70B was not downloaded to this machine" in done.stderr
    assert f"{fix}; or --force" in done.stderr
    script = [str(tmp_path / "job.sh"), "70b-qlora"]
    job = subprocess.run(
        [sys.executable, "-m", "dtrain.supervisor", *script],
        cwd=tmp_path,
        env=os.environ | {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert job.returncode == 2 and f"{fix}; or DTRAIN_FORCE=1" in job.stderr
    assert not (tmp_path / "runs").exists()
    checked = dtrain("check", "70b-qlora", cwd=tmp_path)
    assert checked.returncode == 0 and f"`{fix}` downloads it" in checked.stderr


def test_check_output_loads_as_the_same_recipe(tmp_path: Path) -> None:
    done = dtrain("check", "tiny", "seed=7", cwd=tmp_path)
    (tmp_path / "copy.yaml").write_text(done.stdout)
    assert load_recipe(str(tmp_path / "copy.yaml")) == load_recipe("tiny", ["seed=7"])
    assert "no errors; not checked: " in done.stderr


def test_a_plan_says_that_a_recipe_is_for_cpus(tmp_path: Path) -> None:
    planned = dtrain("plan", "tiny", "device=cpu", cwd=tmp_path)
    assert "this plan is for a h100-80g, and not for CPUs" in planned.stderr


def test_a_sample_without_its_prefix_is_recognized(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    given = ["--base", "tiny-llama", "--data", "rows.jsonl", "--gpu", "cpu"]
    done = dtrain("init", "my.yaml", *given, cwd=tmp_path)
    assert done.returncode == 2 and "write dtrain:tiny-llama for a sample" in done.stderr


def test_check_reports_every_error_and_exits_2(tmp_path: Path) -> None:
    done = dtrain("check", "tiny", "sede=7", "engine.kind=zero4", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "did you mean seed?" in done.stderr and "engine.kind must be" in done.stderr


def test_recipes_lists_every_shipped_recipe(tmp_path: Path) -> None:
    listed = dtrain("recipes", cwd=tmp_path).stdout
    assert all(f"\n{name} " in f"\n{listed}" for name in shipped())


def test_recipe_copy_is_identical_and_never_overwrites(tmp_path: Path) -> None:
    assert dtrain("recipes", "copy", "tiny", cwd=tmp_path).returncode == 0
    copy = tmp_path / "tiny.yaml"
    assert copy.read_bytes() == shipped()["tiny"].read_bytes()
    copy.write_text("mine")
    again = dtrain("recipes", "copy", "tiny", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr
    assert copy.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "tinny"], "did you mean tiny?"),
        (["recipes", "copy", "nope"], "no such shipped recipe"),
        (["recipes", "copy", "tiny", "no/such/folder/x.yaml"], "cannot be written"),
        (["report", "."], "is not a run folder"),
        (["run", "tiny", "output.folder=a-file"], "cannot be used as the run folder"),
        (["run", "tiny", "--fresh", "output.folder=a-file/x"], "cannot be used as the run folder"),
        (["frobnicate"], "No such command"),
        (["run", "tiny", "--frob"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_exit_2_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a-file").write_text("")
    done = dtrain(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_working_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", sys.executable, "-m", "dtrain"]
    command = [*script, "check", "tiny"]
    done = subprocess.run(command, cwd=gone, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the working folder was removed" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_in_use_is_refused_and_untouched(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w", encoding="utf-8") as lock:
        lock.write("process 123 on node-a\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = dtrain("run", "tiny", f"output.folder={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2
    assert "another run is using this folder (process 123 on node-a)" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]


CATCH_EXEC = """
import os, sys
from dtrain.cli import main
def caught(program, command, environment):
    print("EXEC", *command)
    raise SystemExit(0)
os.execve = caught
main()
"""


def test_run_starts_torchrun_with_the_resolved_recipe(tmp_path: Path) -> None:
    arguments = ("run", "tiny", "output.folder=out", "--allow-change", "train.learning_rate")
    done = dtrain(*arguments, cwd=tmp_path, code=CATCH_EXEC)
    recipe = tmp_path / "out" / "recipe.yaml"
    assert "--nproc-per-node=2" in done.stdout
    assert f"-m dtrain.train {recipe} --allow-change train.learning_rate" in done.stdout
    assert load_recipe(str(recipe)) == load_recipe("tiny", [f"output.folder={tmp_path}/out"])


def test_fresh_uses_a_new_folder_and_keeps_the_old(tmp_path: Path) -> None:
    for _ in range(3):
        dtrain("run", "tiny", "output.folder=out", "--fresh", cwd=tmp_path, code=CATCH_EXEC)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-2", "out-3"]
    assert load_recipe(str(tmp_path / "out-3/recipe.yaml")).output.folder == f"{tmp_path}/out-3"


def test_memory_that_runs_out_is_no_bug(tmp_path: Path) -> None:
    code = "import dtrain.cli.root as a, sys\na.app = lambda: bytes(1 << 50)\nsys.exit(a.main())"
    done = dtrain(cwd=tmp_path, code=code)
    assert done.returncode == Exit.OUT_OF_MEMORY
    assert "the memory ran out" in done.stderr and "Traceback" not in done.stderr


def test_internal_error_prints_a_traceback_and_exits_1(tmp_path: Path) -> None:
    code = "import dtrain.cli.root as a, sys\na.app = lambda: 1 / 0\nsys.exit(a.main())"
    done = dtrain(cwd=tmp_path, code=code)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
