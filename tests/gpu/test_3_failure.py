"""Part 3, five minutes at most: what fails on a GPU ends as it does on a CPU."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

QLORA = ["stages.domain.method={kind: qlora, r: 8}", "stages.task.method={kind: qlora, r: 4}"]
TINY = ["model.dtype=bfloat16", "evaluation.generation={}"]
EVERY_STEP = [f"stages.{stage}.train.checkpoint_every_steps=1" for stage in ("domain", "task")]


def wait_for(path: Path, process, seconds: float = 120) -> None:
    """Look until a file is there, while the run lives."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, path
        time.sleep(0.005)


@pytest.mark.measures_gpu
def test_out_of_memory_exits_with_status_4(train, large_base, long_texts) -> None:
    settings = [
        f"model.base={large_base}",
        "evaluation={sets: {}}",
        "engine.kind=ddp",
        "stages.domain.data={sequence_length: 131072, sources: [{path: " + f"{long_texts}" + "}]}",
        "stages.domain.method={kind: full}",
        "stages.domain.train={global_batch_size: 1, steps: 2, learning_rate: 1e-4}",
    ]
    run = train("tiny", *settings, expect=4, launched=True)
    assert "out of memory" in run.output


@pytest.mark.whole_run
def test_signal_in_a_step_saves_and_the_next_start_resumes(start, train, weights) -> None:
    whole = train("tiny", *TINY, *EVERY_STEP, folder="whole")
    process, folder, log = start("tiny", *TINY, *EVERY_STEP)
    wait_for(folder / "domain" / "checkpoints" / "step-000002", process)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(60) == 75, log.read_text()
    assert weights(train("tiny", *TINY, *EVERY_STEP).folder) == weights(whole.folder)


@pytest.mark.whole_run
@pytest.mark.parametrize("moment", ["step", "save"])
def test_killed_run_resumes_to_the_same_weights(start, train, weights, moment) -> None:
    whole = train("tiny", *TINY, *EVERY_STEP, folder="whole")
    process, folder, _ = start("tiny", *TINY, *EVERY_STEP)
    checkpoints = folder / "domain" / "checkpoints"
    wait_for(checkpoints / "step-000002", process)
    if moment == "save":
        wait_for(checkpoints / "step-000003", process)  # the next save begins a step later
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert weights(train("tiny", *TINY, *EVERY_STEP).folder) == weights(whole.folder)


@pytest.mark.whole_run
def test_two_qlora_stages_and_their_merges(train) -> None:
    run = train("tiny", *TINY, *QLORA)
    assert run.losses("task")[-1] < run.losses("task")[0]
    for stage in ("domain", "task"):
        about = "".join(
            path.read_text(encoding="utf-8")
            for path in (run.folder / stage / "merged").glob("*.json")
        )
        assert ('"quantized_on": "cuda"' in about) == torch.cuda.is_available(), stage


@pytest.mark.whole_run
def test_offload_does_not_change_the_losses(train) -> None:
    run = train("tiny", *TINY, "engine={kind: zero3, offload: true}")
    kept = train("tiny", *TINY, "engine={kind: zero3}", folder="kept")
    assert run.losses("domain") == pytest.approx(kept.losses("domain"), abs=3e-2)
