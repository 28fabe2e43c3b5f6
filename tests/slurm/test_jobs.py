"""Jobs as a person starts them: the shipped scripts, `dtrain submit`, submitit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, wait_for

SOURCED = ("job", "container", "python")
SCRIPTS = sorted(p.stem for p in (ROOT / "slurm").glob("*.sh") if p.stem not in SOURCED)
CANARY = "canary-9f27c1"
# Every Python process of a job imports this; it notes who parses a recipe before the first step.
COUNT_PARSES = """
import os, sys
from dtrain.config import load

parse = load.load_recipe
assert parse.__name__ != "counted", "imported twice"

def counted(*arguments, **named):
    if not os.path.exists(os.environ["FIRST_STEP"]):
        with open(os.environ["PARSES"], "a") as file:
            file.write(" ".join(sys.orig_argv) + "\\n")
    return parse(*arguments, **named)

load.load_recipe = counted
"""
SHORT = [
    "evaluation.sets={}",
    *(f"stages.{stage}.train.evaluate_every_steps=null" for stage in ("domain", "task")),
    *(f"stages.{stage}.train.evaluate_on=null" for stage in ("domain", "task")),
]
LONG = [*SHORT, "stages.domain.train.steps=3000", "stages.domain.train.checkpoint_every_steps=50"]


def attempts(run: Path) -> list[dict]:
    path = run / "slurm/attempts.json"
    return json.loads(path.read_text()) if path.exists() else []


def until_training(cluster: Cluster, run: Path, job: str) -> None:
    """Wait for a first checkpoint."""
    wait_for(
        lambda: next(run.glob("domain/checkpoints/step-*/manifest.json"), None),
        200,
        lambda: cluster.log_of(job),
    )


def dtrain(cluster: Cluster, *arguments: object, check: bool = True) -> str:
    python = f"{cluster.environment['DTRAIN_ENV']}/bin/python"
    done = cluster.run(python, "-m", "dtrain", *arguments, check=check)
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_sbatch_accepts_every_script(cluster, script):
    said = cluster.run("sbatch", "--test-only", f"slurm/{script}.sh").stderr
    assert "to start at" in said


@pytest.mark.timeout(180)
def test_70b_qlora_script_trains_a_tiny_model_without_leaking_secrets(cluster, submit, tmp_path):
    run = tmp_path / "run"
    method = [f"stages.{stage}.method.kind=qlora" for stage in ("domain", "task")]
    keys = [*SHORT, *method, "engine={kind: fsdp2, shard: node}", "launch.processes=2"]
    secrets = {"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY, "DTRAIN_PREFLIGHT": "on"}
    (tmp_path / "sitecustomize.py").write_text(COUNT_PARSES)
    count = {"PYTHONPATH": str(tmp_path), "PARSES": str(tmp_path / "parses")}
    count["FIRST_STEP"] = str(run / "domain/metrics.jsonl")
    job = submit("70b-qlora", [], [*keys, f"output.folder={run}"], **secrets, **count)
    arguments = watch_arguments(cluster, job)
    facts, log = cluster.job(job), cluster.log_of(job)
    assert facts["JobState"] == "COMPLETED", log
    for stage in ("domain", "task"):
        assert (run / stage / "adapter/adapter_model.safetensors").is_file()
    assert (run / "task/merged/config.json").is_file()
    lineage = json.loads((run / "lineage.json").read_text())
    assert {a["engine"] for a in lineage["artifacts"]} == {"fsdp2"}
    assert {a["ranks"] for a in lineage["artifacts"]} == {4}
    assert "all is well on 2 nodes" in log and "all-reduce inside a node" in log
    parses = (tmp_path / "parses").read_text().splitlines()
    by_ranks = [line for line in parses if "-m dtrain.train " in line]
    assert len(by_ranks) == 4 and len(parses) == 5  # one each, and the supervisor
    shown = cluster.run("scontrol", "show", "job", "-dd", job).stdout
    script = cluster.run("scontrol", "write", "batch_script", job, "-").stdout
    for text in (arguments, log, shown, script):
        assert CANARY not in text
    matches = subprocess.run(["grep", "-rl", CANARY, run, tmp_path], capture_output=True, text=True)
    assert matches.stdout == ""


def watch_arguments(cluster: Cluster, job: str) -> str:
    """Every command line on the cluster while a job runs."""
    seen: set[str] = set()

    def look() -> bool | None:
        seen.update(cluster.run("ps", "-eo", "args").stdout.splitlines())
        return cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING") or None

    wait_for(look, 150, lambda: cluster.log_of(job))
    assert any("dtrain.train" in line for line in seen)
    return "\n".join(seen)


def test_recipe_error_fails_at_once_without_a_requeue(cluster, submit, tmp_path):
    job = submit("single-node", [], ["engine.kin=ddp", f"output.folder={tmp_path}/run"])
    facts = cluster.wait(job)
    assert facts["JobState"] == "FAILED" and facts["Restarts"] == "0"
    assert facts["ExitCode"] == "2:0"
    assert "did you mean" in cluster.log_of(job)


def test_job_that_cannot_fit_ends_before_any_rank_starts(cluster, submit, tmp_path):
    """The pretended GPUs get a driver that says which they are."""
    driver = tmp_path / "bin/nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\necho '0, NVIDIA GeForce RTX 4090, 24564, 3, 0'\n")
    driver.chmod(0o755)
    environ = {"PATH": f"{driver.parent}:{os.environ['PATH']}", "DTRAIN_RECIPE": "70b-lora-zero3"}
    keys = ["device=auto", f"output.folder={tmp_path}/run"]
    job = submit("single-node", [], keys, **environ)
    facts, log = cluster.wait(job), cluster.log_of(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert "on 1 x 8 rtx4090-24g: DOES NOT FIT" in log and "DTRAIN_FORCE=1" in log
    assert attempts(tmp_path / "run") == []


@pytest.mark.timeout(150)
def test_permanent_failure_is_requeued_a_limited_number_of_times(cluster, submit, tmp_path):
    run = tmp_path / "run"
    broken = {"LOGLEVEL": "no level", "DTRAIN_MAX_FAILURES": "2"}  # torchrun dies of it
    keys = [*SHORT, "launch.processes=1", f"output.folder={run}"]
    job = submit("single-node", ["--gpus-per-node=1"], keys, **broken)
    cluster.until(job, lambda facts: facts["JobState"] == "FAILED", 120)
    assert cluster.job(job)["Restarts"] == "1"
    assert [a["action"] for a in attempts(run)] == ["requeue", "stop"]
    assert "2 tries in a row without a new checkpoint" in cluster.log_of(job)


@pytest.mark.timeout(450)
def test_job_with_a_hostile_name_is_listed_and_canceled(cluster, tmp_path):
    run = tmp_path / "a'; touch stolen; $(touch stolen) #\n%j"
    keys = [*LONG, "device=cpu", "launch.processes=1", 'name="a\'; touch stolen"']
    folder = f"output.folder={json.dumps(str(run))}"
    said = dtrain(cluster, "submit", "tiny", "--prepare", *keys, folder)
    preparation, job = said.split(";")[0].removeprefix("submitted job ").split(" and then ")
    assert "waiting: Dependency" in dtrain(cluster, "status", run)
    again = dtrain(cluster, "submit", "tiny", *keys, folder, check=False)
    assert "for this run folder" in again
    assert cluster.wait(preparation)["JobState"] == "COMPLETED"
    until_training(cluster, run, job)
    assert f"job {job} " in dtrain(cluster, "jobs")
    status = dtrain(cluster, "status", run)
    assert "is running on" in status and "requeued never" in status
    assert f"attempt 1 of job {job}" in dtrain(cluster, "logs", run)
    assert job in dtrain(cluster, "cancel", run)
    facts = cluster.wait(job)  # it is COMPLETING until the supervisor, who may requeue it, is gone
    assert facts["JobState"] == "CANCELLED" and facts["Restarts"] == "0"
    assert not [*tmp_path.rglob("stolen"), *ROOT.glob("stolen")]


@pytest.mark.timeout(500)
def test_submitit_job_trains(cluster, tmp_path):
    python = f"{cluster.environment['DTRAIN_ENV']}/bin/python"
    common = [python, "launch/submit.py", "--folder", tmp_path / "submitit", "--gpus", 1]
    keys = ["device=cpu", "evaluation.generation={}", "launch.processes=1"]
    run = tmp_path / "run"
    steps = ["stages.domain.train.steps=600", "stages.domain.train.checkpoint_every_steps=50"]
    words = ["tiny", *keys, *SHORT, *steps, f"output.folder={run}"]
    job = cluster.run(*common, "--nodes", 2, *words).stdout.strip()
    until_training(cluster, run, job)
    cluster.run("scancel", "--signal=USR2", job)  # as its time-out would
    recipes = []
    for number in range(3):
        recipe = tmp_path / f"r{number}.yaml"
        text = (ROOT / "dtrain/recipes/tiny.yaml").read_text()
        recipe.write_text(text.replace("runs/tiny", f"{tmp_path}/array-{number}"))
        recipes.append(recipe)
    array = cluster.run(*common, *recipes, *keys, *SHORT).stdout.split()
    assert len({name.split("_")[0] for name in array}) == 1 and len(array) == 3
    for name in [job, *array]:
        facts = cluster.wait(name, 150)
        assert facts["JobState"] == "COMPLETED", (name, facts, cluster.log_of(name))
    assert [a["outcome"] for a in attempts(run)] == ["warned", "finished"]
    for folder in [run, *(tmp_path / f"array-{number}" for number in range(3))]:
        assert (folder / "task/merged/config.json").is_file()


# Pretended containers: a process starts in one as itself, and is noted.
CONTAINERS = {
    "apptainer": """\
while [[ "$1" != "$DTRAIN_CONTAINER" ]]; do shift; done; shift
echo "$@" >>"$NOTES"; exec "$@"
""",
    "srun": """\
if [[ "$1" == --help ]]; then echo " --container-image=x"; exit; fi
options=(); while [[ "$1" == --* ]]; do
    [[ "$1" == --container-* ]] || options+=("$1")
    [[ "$1" != --container-image=* ]] || image=1
    shift
done
[[ -z "${image:-}" ]] || echo "$@" >>"$NOTES"
exec REAL "${options[@]}" "$@"
""",
}


@pytest.mark.timeout(350)
@pytest.mark.parametrize(("program", "image"), [("apptainer", "x.sif"), ("srun", "docker://x")])
def test_job_in_a_container_is_checked_trained_and_warned(
    program, image, cluster, submit, tmp_path
):
    run, notes, programs = tmp_path / "run", tmp_path / "notes", tmp_path / "bin"
    programs.mkdir()
    real = cluster.run("which", "srun").stdout.strip()
    text = CONTAINERS[program].replace("REAL", real)
    for name, lines in ((program, text), ("python3", f'exec {sys.executable} "$@"\n')):
        (programs / name).write_text(f"#!/bin/bash\n{lines}")
        (programs / name).chmod(0o755)
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(notes)}
    environ |= {"DTRAIN_CONTAINER": image, "DTRAIN_PREFLIGHT": "on"}
    keys = [*LONG, "launch.processes=1", f"output.folder={run}"]
    job = submit("single-node", ["--nodes=2"], keys, **environ)
    until_training(cluster, run, job)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(
        lambda: [a for a in attempts(run) if a["outcome"]] or None, 60, lambda: cluster.log_of(job)
    )
    cluster.run("scancel", job)
    assert attempts(run)[0]["outcome"] == "warned", cluster.log_of(job)
    lines = notes.read_text()
    for module in ("supervisor", "launching.node_probe", "torchrun"):
        assert f"-m dtrain.{module} " in lines
    assert "all is well on 2 nodes" in cluster.log_of(job)
