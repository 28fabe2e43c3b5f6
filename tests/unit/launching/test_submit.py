"""`dtrain submit --dry-run` of every shipped recipe, and of hostile names.

`DTRAIN_WRITE_GOLDEN=1 pytest tests/unit/launching/test_submit.py` rewrites the files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dtrain.cli import app
from dtrain.core.errors import UserError
from dtrain.launching.submit import Resources, job_name, log_pattern
from dtrain.recipes import shipped

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests/golden/submit"
OPTIONS = {
    "70b-qlora": ["--nodes", "2", "--partition", "gpu", "--account", "lab", "--prepare"],
    "70b-lora-zero3": ["--nodes", "2", "--after", "41", "--time", "3-00:00:00"],
}


def dry_run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["submit", "--dry-run", *map(str, arguments)])
    assert done.exception is None, done.exception
    return done.stdout


def settled(text: str, working: Path) -> str:
    """Without what differs between machines."""
    for folder, name in ((working, "/work"), (sys.prefix, "/env"), (ROOT, "/checkout")):
        text = text.replace(str(folder), name)
    return text


@pytest.mark.parametrize("recipe", shipped())
def test_job_script_of_every_recipe_matches_the_golden_file(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = settled(dry_run(recipe, *OPTIONS.get(recipe, [])), tmp_path)
    golden = GOLDEN / f"{recipe}.txt"
    if "DTRAIN_WRITE_GOLDEN" in os.environ:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(said)
    assert said == golden.read_text()
    assert list(tmp_path.iterdir()) == []


def test_job_accepts_settings_forced_by_submit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    much = ["70b-lora-zero3", "--gpu", "rtx4090", "--force"]
    lines = dry_run(*much).splitlines()
    assert lines.index("DTRAIN_FORCE=1") < lines.index(f"source {ROOT}/slurm/job.sh")
    assert "DTRAIN_FORCE" not in dry_run("70b-qlora")


JOB_SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "slurm").glob("*.sh"))
    if "#SBATCH" in path.read_text()
]


def test_script_environment_reaches_its_programs(tmp_path):
    """Lines of the script that `dtrain submit` writes, up to the first program."""
    (tmp_path / "python").write_text("#!/bin/sh\nenv >seen\nexit 2\n")
    (tmp_path / "python").chmod(0o755)
    said = "DTRAIN_RECIPE=tiny\nDTRAIN_PREFLIGHT=exclude\nDTRAIN_FORCE=1\n"
    (tmp_path / "bin").symlink_to(tmp_path)
    script = f"DTRAIN_ENV={tmp_path}\n{said}source {ROOT}/slurm/job.sh\n"
    assert subprocess.run(["bash"], input=script, text=True, cwd=tmp_path).returncode == 2
    seen = (tmp_path / "seen").read_text().splitlines()
    assert {"DTRAIN_PREFLIGHT=exclude", "DTRAIN_FORCE=1"} <= set(seen)


@pytest.mark.parametrize("variable", ["DTRAIN_ENV", "DTRAIN_HOME"])
@pytest.mark.parametrize("script", [*JOB_SCRIPTS, "launch/torchrun.sh"])
def test_scripts_name_the_variable_that_leads_nowhere(script, variable, tmp_path):
    environ = {"PATH": "/usr/bin:/bin", "DTRAIN_HOME": str(ROOT), variable: str(tmp_path / "gone")}
    if script.startswith("launch") and variable == "DTRAIN_HOME":
        pytest.skip("it is in the checkout itself")
    command = ["bash", str(ROOT / script), "tiny"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{variable}={tmp_path / 'gone'}" in done.stderr and "set " + variable in done.stderr


def test_submitit_starts_no_job_of_a_recipe_with_faults(tmp_path):
    faults = ["stages.task.data.sources.0.path=gone.json", "stages.task.method.target_modules=[q]"]
    command = [sys.executable, str(ROOT / "launch/submit.py"), "--executor=local", "tiny", *faults]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert "gone.json: no such file" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_are_quoted(tmp_path, monkeypatch):
    hostile = "a'; touch x; $(touch x)\n#SBATCH --uid=0\n`touch x`"
    working = tmp_path / hostile
    working.mkdir()
    monkeypatch.chdir(working)
    value = json.dumps(hostile)
    said = dry_run("--prepare", "tiny", f"name={value}", f"output.folder={value}")
    heads = [line for line in said.splitlines() if line.startswith("#SBATCH")]
    assert {line.split("=")[0] for line in heads if "job-name" in line} == {"#SBATCH --job-name"}
    harmless = said.replace("source ", ": ").replace("exec ", ": ").replace("exit 2", "exit 0")
    subprocess.run(["bash", "-n"], input=said, text=True, check=True)
    subprocess.run(["bash"], input=harmless, text=True, check=True, cwd=working)
    assert not [path for path in tmp_path.rglob("x")]


def test_names_that_slurm_rejects_are_refused():
    for bad in ({"partition": "a b"}, {"time": "1h"}, {"after": "1;2"}, {"preflight": "of"}):
        with pytest.raises(UserError, match="cannot be passed"):
            Resources(**bad)
    with pytest.raises(UserError, match="backslash"):
        log_pattern(Path("/a\\b"))
    assert log_pattern(Path("/a%j")) == "/a%%j"
    assert job_name("a'; touch x\n") == "a-touch-x"
    assert job_name("日本") == "dtrain"
