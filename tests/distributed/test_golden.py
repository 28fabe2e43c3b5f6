"""One recipe gives the same losses under every engine, rank count, micro-batch and launcher.

The golden files hold the loss and the gradient norm of every step of `tiny`, both stages, as text.
The qlora file trains its second stage with lora: the merged base differs in its last bits from
machine to machine, so some weights would get another NF4 code. To rewrite the files after a change
that is meant to change the losses: `DTRAIN_WRITE_GOLDEN=1 pytest tests/distributed/test_golden.py
-k 'two_ranks and ddp'`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
METHODS = {
    "lora": [],
    "qlora": ["stages.domain.method.kind=qlora"],
    "full": [
        "stages.domain.method={kind: full}",
        "stages.task.method={kind: full}",
        "stages.domain.train.learning_rate=1e-3",
        "stages.task.train.learning_rate=1e-3",
    ],
}
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
LAUNCHERS = {
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--config_file"],
    "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_golden_losses_on_two_ranks(start_ranks, engine, method):
    overrides = [f"engine.kind={engine}", *METHODS[method]]
    run = start_ranks(*overrides, evaluates=method == "lora").wait(0)
    run.assert_golden(method)
    run.assert_time_in_collectives()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batch_of_two(start_ranks, engine, ranks):
    micro = [f"stages.{stage}.train.micro_batch_size=2" for stage in ("domain", "task")]
    run = start_ranks(f"engine.kind={engine}", *micro, ranks=ranks, evaluates=False).wait(0)
    run.assert_golden("lora")


@pytest.mark.parametrize("method", METHODS)
def test_kernels_off_gives_the_same_losses(start_ranks, method):
    overrides = ["model.kernels=off", "engine.kind=zero3", *METHODS[method]]
    run = start_ranks(*overrides, evaluates=False).wait(0)
    run.assert_golden(method)


def test_hybrid_sharding_on_four_ranks(start_ranks):
    run = start_ranks("engine={kind: fsdp2, shard: 2}", ranks=4, evaluates=False).wait(0)
    run.assert_golden("lora")


def test_started_by_accelerate(run_tiny):
    """With fsdp2: accelerate itself would run ddp on CPUs, and not say so."""
    file = ROOT / "launch" / "accelerate" / "fsdp2.yaml"
    launcher = [*LAUNCHERS["accelerate"], str(file), "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port())]
    run = run_tiny(launcher=launcher, evaluates=False)
    run.assert_golden("lora")
    assert run.json("lineage.json")["artifacts"][0]["engine"] == "fsdp2"


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_accelerate_hands_its_engine_to_the_ranks(engine, tmp_path):
    file, worker = ROOT / "launch" / "accelerate" / f"{engine}.yaml", tmp_path / "worker.py"
    worker.write_text(
        "import os\n"
        "from dtrain.launching.accelerate_env import resolve_engine\n"
        "words = 'ENGINE', resolve_engine('auto', os.environ), os.environ['WORLD_SIZE']\n"
        "os.write(1, (' '.join(words) + '\\n').encode())\n"  # in one piece: the ranks share a pipe
    )
    command = [*LAUNCHERS["accelerate"], str(file), "--num_processes", "2"]
    command += ["--main_process_port", str(free_port()), str(worker)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ENGINE")]
    assert lines == [f"ENGINE {engine} 2"] * 2


def test_started_by_deepspeed(run_tiny):
    launcher = [*LAUNCHERS["deepspeed"], "--num_accelerators", "2"]
    launcher += ["--master_port", str(free_port())]
    run = run_tiny(
        "engine.kind=zero2",
        launcher=launcher,
        worker=["--module", "dtrain.train"],
        evaluates=False,
    )
    run.assert_golden("lora")
