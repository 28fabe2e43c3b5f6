"""The fault matrix: each fault is detected, reported once, and the run resumes or is rejected.

Faults that need no run of several processes have unit tests; tests/README.md lists all of them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

STOP_AT_ONCE = {"DTRAIN_END_TIME": "1"}
EVERY_STEP = [f"stages.{stage}.train.checkpoint_every_steps=1" for stage in ("domain", "task")]


@pytest.fixture
def separate_inputs(tmp_path: Path, cache: Path, start_ranks) -> list[str]:
    """Overrides for a separate copy of base and data."""
    start_ranks(ranks=1, folder="samples", env=STOP_AT_ONCE).wait(75)  # makes them
    shutil.copytree(cache / "samples/tiny-llama", tmp_path / "base")
    shutil.copy(cache / "samples/tiny-text/domain.jsonl", tmp_path / "texts.jsonl")
    source = f"{{path: '{tmp_path}/texts.jsonl', format: text}}"
    return [f"model.base={tmp_path}/base", f"stages.domain.data.sources=[{source}]"]


def content(folder: Path) -> dict[str, bytes]:
    """Content of every file of a run's stages."""
    return {str(p): p.read_bytes() for p in sorted(folder.glob("*/**/*")) if p.is_file()}


def assert_reported_once(output: str, said: str) -> None:
    assert said in output, output
    assert output.count("error:") == 1 and "Traceback" not in output, output


# --- inputs that changed since the run was started: rejected, and nothing is modified -----------


def grow_data(folder: Path) -> None:
    with open(folder / "texts.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')


def change_base(folder: Path) -> None:
    path = folder / "base/model.safetensors"
    weights = bytearray(path.read_bytes())
    weights[-2] ^= 1
    path.write_bytes(weights)


def change_tokenizer(folder: Path) -> None:
    path = folder / "base/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))


def open_to_all(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "run" / name).chmod(0o777)


def put_pickle(folder: Path) -> None:
    (folder / "run/domain/checkpoints/step-000001/optimizer.pt").write_bytes(b"\x80\x04N.")


def nothing(folder: Path) -> None:
    """Change no file: only the overrides differ."""


@pytest.mark.parametrize(
    ("change", "override", "said"),
    [
        (grow_data, "seed=0", "data.content: "),
        (change_base, "seed=0", "parent: "),
        (change_tokenizer, "seed=0", "tokenizer: "),
        (nothing, "seed=1", "seed: 0 in the checkpoint, 1 now"),
        (nothing, "stages.domain.train.global_batch_size=8", "global_batch_size: 4"),
        (open_to_all("."), "seed=0", "anyone may write to it"),
        (open_to_all("domain"), "seed=0", "anyone may write to it"),
        (open_to_all("domain/checkpoints"), "seed=0", "anyone may write to it"),
        (put_pickle, "seed=0", "not listed in the checkpoint's manifest"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_changed_inputs_are_rejected(
    start_ranks, separate_inputs, tmp_path, change, override, said
) -> None:
    run = start_ranks(*separate_inputs, ranks=1, env=STOP_AT_ONCE).wait(75)
    change(tmp_path)
    before = content(run.folder)
    refused = start_ranks(*separate_inputs, override, ranks=1).wait(2)
    assert_reported_once(refused.output, said)
    assert content(run.folder) == before
    assert refused.json("outcome.json")["outcome"] == "interrupted"
    assert change.__name__ == "<lambda>" or refused.json("refused.json")["status"] == 2


def test_checkpoint_of_another_run_is_rejected(start_ranks) -> None:
    run = start_ranks(ranks=1, env=STOP_AT_ONCE).wait(75)
    rate = "stages.domain.train.learning_rate=0.02"
    other_run = start_ranks(rate, ranks=1, folder="other", env=STOP_AT_ONCE).wait(75)
    shutil.rmtree(run.folder / "domain/checkpoints")
    shutil.copytree(other_run.folder / "domain/checkpoints", run.folder / "domain/checkpoints")
    refused = start_ranks(ranks=1).wait(2)
    assert_reported_once(refused.output, "train.learning_rate: 0.02 in the checkpoint, 0.01 now")


# --- wrong input: reported once by all ranks ----------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"text": "half a li', "texts.jsonl:241"), ('{"txet": "a slip"}', "texts.jsonl:241")],
)
def test_broken_line_is_reported_once(start_ranks, separate_inputs, tmp_path, line, said) -> None:
    with open(tmp_path / "texts.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    run = start_ranks(*separate_inputs).wait()
    assert_reported_once(run.output, said)
    assert run.json("outcome.json")["status"] == 2


def test_persistent_nan_loss_ends_the_run(start_ranks) -> None:
    run = start_ranks("stages.domain.train.learning_rate=1e30", *EVERY_STEP).wait(3)
    assert_reported_once(run.output, "not finite 3 steps in a row")
    assert run.json("outcome.json")["status"] == 3
    assert [r["loss"] for r in run.records("domain") if "skipped" in r] == [None] * 3


# --- damage: detected before use; the run resumes from intact files -----------------------------


def damage(path: Path) -> None:
    """Flip one bit."""
    draw = random.Random(path.name)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Remove the second half."""
    os.truncate(path, path.stat().st_size // 2)


def test_damaged_files_are_named_and_the_run_ends_with_the_same_weights(
    start_ranks, weights
) -> None:
    undisturbed = start_ranks(ranks=1, folder="undisturbed").wait(0)
    for _ in range(3):
        start_ranks(ranks=1, env=STOP_AT_ONCE).wait(75)
    folder = undisturbed.folder.with_name("run")
    damage(folder / "domain/checkpoints/step-000003/rank-00000.safetensors")
    run = start_ranks(ranks=1, env=STOP_AT_ONCE).wait(75)
    assert "step 3 cannot be used" in run.output and "rank-00000.safetensors" in run.output
    assert "resuming from step 2" in run.output
    cut(folder / "domain/checkpoints/step-000003/rank-00000.safetensors")
    damage(folder / "domain/stage.json")
    run = start_ranks(ranks=1).wait(0)
    assert "stage.json is damaged" in run.output and "resuming from step 2" in run.output
    assert weights(folder) == weights(undisturbed.folder)

    damage(folder / "domain/merged/model.safetensors")
    damage(folder / "task/adapter/adapter_model.safetensors")
    run = start_ranks(ranks=1).wait(0)
    assert "domain/merged/model.safetensors is not what was written" in run.output
    assert "task/adapter/adapter_model.safetensors is not what was written" in run.output
    assert weights(folder) == weights(undisturbed.folder)


def test_damaged_data_is_named(start_ranks, tmp_path) -> None:
    env = {"DTRAIN_CACHE": str(tmp_path / "cache")}
    start_ranks(ranks=1, env=env | STOP_AT_ONCE).wait(75)
    shard = sorted((tmp_path / "cache/stores").glob("*/shard-*.arrow"))[0]
    damage(shard)
    run = start_ranks(env=env).wait(2)
    assert_reported_once(run.output, str(shard))


@pytest.fixture
def small_disk(mount_disk) -> Path:
    """A run folder on a file system of 1 MiB."""
    return mount_disk("1m")


def test_full_disk_is_reported_and_the_run_resumes_with_more_space(
    start_ranks, weights, small_disk
) -> None:
    settings = [*EVERY_STEP, "output.keep_checkpoints=9"]
    undisturbed = start_ranks(*settings, folder="undisturbed").wait(0)
    run = start_ranks(*settings, folder=small_disk).wait(2)
    assert_reported_once(run.output, "No space left on device")
    assert "the earlier ones are intact" in run.output
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    run = start_ranks(*settings, folder=small_disk).wait(0)
    assert "resuming from step" in run.output
    assert weights(run.folder) == weights(undisturbed.folder)


# --- processes that are killed or stopped -------------------------------------------------------


def test_kill_during_a_save_resumes_from_the_previous_checkpoint(start_ranks, weights) -> None:
    undisturbed = start_ranks(*EVERY_STEP, folder="undisturbed").wait(0)
    checkpoints = undisturbed.folder.with_name("run") / "domain/checkpoints"
    start_ranks(*EVERY_STEP, dies_at="/.step-000003").wait()  # both, before their records
    assert list(checkpoints.glob(".step-*"))
    run = start_ranks(*EVERY_STEP).wait(0)
    assert "was not finished" in run.output
    assert not list(checkpoints.glob(".*"))
    assert weights(run.folder) == weights(undisturbed.folder)


@pytest.mark.parametrize("victim", ["worker", "launcher"])
def test_same_command_resumes_after_a_kill(dtrain_run, start_ranks, victim) -> None:
    live = dtrain_run(*EVERY_STEP)
    live.until_step("domain", 2)
    workers = [live.worker(0), live.worker(1)]
    (workers[1] if victim == "worker" else live.process).kill()
    live.wait(1 if victim == "worker" else -signal.SIGKILL)
    psutil.wait_procs(workers, 10)
    assert not any(worker.is_running() for worker in workers), "orphans"
    again = (dtrain_run if victim == "launcher" else start_ranks)(*EVERY_STEP).wait(0)
    assert "resuming from step" in again.output
    again.assert_golden("lora")


def test_stopped_worker_is_named_and_killed(dtrain_run, start_ranks) -> None:
    settings = ["stages.domain.train.steps=60", *EVERY_STEP]
    live = dtrain_run(*settings)
    live.until_step("domain", 5)
    worker = live.worker(1)
    worker.suspend()
    live.wait(5)
    assert not worker.is_running()
    outcome = live.json("outcome.json")
    assert outcome["status"] == 5 and outcome["outcome"] == "failed"
    said = "rank 1 does not advance; last seen at: "
    assert outcome["reason"].startswith(said) and 'File "' in outcome["reason"]
    assert live.output.count(said) == 1
    again = start_ranks(*settings).wait(0)
    assert "resuming from step" in again.output
