"""The plan at the head of a job, for the GPUs that a driver names."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.config.load import load_recipe
from dtrain.core.errors import Exit, UserError
from dtrain.launching.submitit import Training
from dtrain.planning.fit_gate import check_job
from dtrain.planning.known_models import check_trainable

RTX4090, H100 = "NVIDIA GeForce RTX 4090, 24564", "NVIDIA H100 80GB HBM3, 81559"
JOB = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "8"}
MUCH = "70b-lora-zero3"


def driver(monkeypatch, folder: Path, *gpus: str) -> None:
    """An nvidia-smi that tells of these, before any other."""
    lines = [f"{number}, {gpu}, 3, 0" for number, gpu in enumerate(gpus)]
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def head(monkeypatch, capsys):
    """`head(recipe, KEY=…)`: the exit status at the head of a job, and what its log has."""

    def run(*words: str, **environ: str) -> tuple[int, str]:
        for name, value in (JOB | environ).items():
            monkeypatch.setenv(name, value)
        status: int = Exit.FINISHED
        try:
            recipe = load_recipe(words[0], words[1:])
            check_trainable(recipe.model.base)
            check_job(recipe, os.environ)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = error.status
        return status, capsys.readouterr().err

    return run


def test_refused_on_the_gpu_that_is_there_whatever_was_said_of_it(head, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, *[H100] * 7, RTX4090)
    status, log = head(MUCH, DTRAIN_GPU="h100-80g")
    assert status == Exit.USER_ERROR
    assert "70b-lora-zero3 on 1 x 8 rtx4090-24g: DOES NOT FIT" in log and "GPU memory" in log
    assert "error: stage domain: DOES NOT FIT on rtx4090-24g: at least" in log
    assert "method.kind=qlora" in log and "DTRAIN_FORCE=1" in log


def test_forced_as_submit_forces_it(head, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, *[RTX4090] * 8)
    status, log = head(MUCH, DTRAIN_FORCE="1")
    assert status == 0 and "DOES NOT FIT" in log and "error" not in log


def test_a_requeued_job_says_one_line(head, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, *[H100] * 8)
    first, again = head("7b-lora"), head("7b-lora", SLURM_RESTART_COUNT="1")
    assert first[0] == again[0] == 0 and len(first[1].splitlines()) > 20
    assert again[1] == "7b-lora on 1 x 8 h100-80g: FITS\n"


def test_a_card_that_the_plan_does_not_know_has_the_memory_it_says(head, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, "Tesla V100-SXM2-32GB, 32768")
    status, log = head("7b-lora", SLURM_GPUS_ON_NODE="1")
    assert status == 0
    assert "of 34.4 GB" in log and "no published speed of Tesla V100-SXM2-32GB" in log


def test_without_a_driver_it_is_what_was_said(head):
    assert head("7b-lora")[1] == ""
    assert "on 1 x 8 a100-80g" in head("7b-lora", DTRAIN_GPU="a100-80g")[1]
    status, log = head("7b-lora", DTRAIN_GPU="a10-80g")
    assert status == Exit.USER_ERROR and "did you mean" in log


@pytest.mark.parametrize(
    "environ", [{"SLURM_GPUS_ON_NODE": "0"}, {"SLURM_GPUS_ON_NODE": ""}, {"DEVICE": "cpu"}]
)
def test_on_cpus_nothing_is_said(head, environ: dict[str, str]):
    keys = ["device=cpu"] if environ.pop("DEVICE", "") else []
    assert head(MUCH, *keys, DTRAIN_GPU="rtx4090", **environ) == (0, "")


def test_a_base_that_the_plan_does_not_know_is_not_refused(head):
    status, log = head("7b-lora", "model.base=/nowhere", DTRAIN_GPU="l4")
    assert status == 0 and log.startswith("not planned: ")


def test_what_submitit_starts_is_refused_too(monkeypatch):
    for name, value in (JOB | {"SLURM_JOB_ID": "1", "DTRAIN_GPU": "rtx4090"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="DOES NOT FIT on rtx4090-24g: at least"):
        Training(MUCH)()


def test_it_is_started_as_the_job_starts_it():
    environ = os.environ | JOB | {"DTRAIN_GPU": "rtx4090"}
    command = [sys.executable, "-m", "dtrain.launching.supervisor", "job.sh", MUCH]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (Exit.USER_ERROR, "")
    wrong = subprocess.run(
        [*command, "engin.kind=ddp"], env=environ, capture_output=True, text=True
    )
    assert wrong.returncode == Exit.USER_ERROR and "did you mean" in wrong.stderr
