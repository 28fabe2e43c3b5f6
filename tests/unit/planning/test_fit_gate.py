"""The plan at the start of a job, for the GPUs that the driver reports."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.config.load import load_recipe
from dtrain.core.errors import Exit, UserError
from dtrain.planning.fit_gate import check_job
from dtrain.submitit_jobs import Training

RTX4090, H100 = "NVIDIA GeForce RTX 4090, 24564", "NVIDIA H100 80GB HBM3, 81559"
JOB = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "8"}
LARGE_RECIPE = "70b-lora-zero3"


def driver(monkeypatch, folder: Path, *gpus: str) -> None:
    """Put an nvidia-smi that reports these GPUs first on the path."""
    lines = [f"{number}, {gpu}, 3, 0" for number, gpu in enumerate(gpus)]
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def head(monkeypatch, capsys):
    """`head(recipe, KEY=…)`: the exit status of the check at a job's start, and its log."""

    def run(*words: str, **environ: str) -> tuple[int, str]:
        for name, value in (JOB | environ).items():
            monkeypatch.setenv(name, value)
        status: int = Exit.FINISHED
        try:
            recipe = load_recipe(words[0], words[1:])
            check_job(recipe, os.environ)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = error.status
        return status, capsys.readouterr().err

    return run


def test_a_job_is_stopped_on_the_gpu_that_the_driver_reports(head, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, *[H100] * 7, RTX4090)
    status, log = head(LARGE_RECIPE, DTRAIN_GPU="h100-80g")
    assert status == Exit.USER_ERROR
    assert "70b-lora-zero3 on 1 x 8 rtx4090-24g: DOES NOT FIT" in log and "GPU memory" in log
    assert "error: stage domain: DOES NOT FIT on rtx4090-24g: at least" in log
    assert "method.kind=qlora" in log and "DTRAIN_FORCE=1" in log


def test_force_runs_a_job_that_does_not_fit(head, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, *[RTX4090] * 8)
    status, log = head(LARGE_RECIPE, DTRAIN_FORCE="1")
    assert status == 0 and "DOES NOT FIT" in log and "error" not in log


def test_a_requeued_job_prints_one_line(head, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, *[H100] * 8)
    first, again = head("7b-lora"), head("7b-lora", SLURM_RESTART_COUNT="1")
    assert first[0] == again[0] == 0 and len(first[1].splitlines()) > 20
    assert again[1] == "7b-lora on 1 x 8 h100-80g: FITS\n"


def test_an_unknown_gpu_gets_the_memory_that_the_driver_reports(head, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, "Tesla V100-SXM2-32GB, 32768")
    status, log = head("7b-lora", SLURM_GPUS_ON_NODE="1")
    assert status == 0
    assert "of 34.4 GB" in log and "no published speed of Tesla V100-SXM2-32GB" in log


def test_without_a_driver_the_environment_names_the_gpu(head):
    assert head("7b-lora")[1] == ""
    assert "on 1 x 8 a100-80g" in head("7b-lora", DTRAIN_GPU="a100-80g")[1]
    status, log = head("7b-lora", DTRAIN_GPU="a10-80g")
    assert status == Exit.USER_ERROR and "did you mean" in log


@pytest.mark.parametrize(
    "environ", [{"SLURM_GPUS_ON_NODE": "0"}, {"SLURM_GPUS_ON_NODE": ""}, {"DEVICE": "cpu"}]
)
def test_a_job_on_cpus_prints_nothing(head, environ: dict[str, str]):
    keys = ["device=cpu"] if environ.pop("DEVICE", "") else []
    assert head(LARGE_RECIPE, *keys, DTRAIN_GPU="rtx4090", **environ) == (0, "")


def test_an_unknown_base_does_not_stop_a_job(head):
    status, log = head("7b-lora", "model.base=/nowhere", DTRAIN_GPU="l4")
    assert status == 0 and log.startswith("not planned: ")


def test_a_submitit_job_is_stopped_too(monkeypatch):
    for name, value in (JOB | {"SLURM_JOB_ID": "1", "DTRAIN_GPU": "rtx4090"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="DOES NOT FIT on rtx4090-24g: at least"):
        Training(LARGE_RECIPE)()


def test_the_module_runs_as_the_job_script_runs_it():
    environ = os.environ | JOB | {"DTRAIN_GPU": "rtx4090"}
    command = [sys.executable, "-m", "dtrain.supervisor", "job.sh", LARGE_RECIPE]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (Exit.USER_ERROR, "")
    wrong = subprocess.run(
        [*command, "engin.kind=ddp"], env=environ, capture_output=True, text=True
    )
    assert wrong.returncode == Exit.USER_ERROR and "did you mean" in wrong.stderr
