"""Killed, stopped, on other ranks, under another engine: it ends where it would have ended."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.samples.tiny_llama import build_tokenizer

STOP_AT_ONCE = {"DTRAIN_END_TIME": "1"}  # the job's end is past: one step, a checkpoint, status 75
# Dropout shows that no random state is missing: it follows from seed, step and sequence.
EVERY_STEP = [
    f"stages.{stage}.{setting}"
    for stage in ("domain", "task")
    for setting in ("method.dropout=0.1", "train.checkpoint_every_steps=1")
]


def mixed_base(folder: Path) -> Path:
    """A gated delta net, attention and experts, with the sample model's tokenizer."""
    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=512, hidden_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("engine", "method", "base"),
    [("ddp", "lora", "sample"), ("zero3", "lora", "mixed"), ("zero2", "dora", "sample")],
)
def test_kills_in_both_stages_end_with_the_same_weights(
    start_ranks, weights, tmp_path, engine, method, base
) -> None:
    kinds = [f"stages.{stage}.method.kind={method}" for stage in ("domain", "task")]
    settings = [f"engine.kind={engine}", *kinds, *EVERY_STEP]
    settings += [f"model.base={mixed_base(tmp_path / 'base')}"] if base == "mixed" else []
    undisturbed = start_ranks(*settings, folder="undisturbed").wait(0)
    for stage, step in (("domain", 6), ("task", 3)):
        run = start_ranks(*settings)
        run.until(lambda: run.is_at(stage, step))  # noqa: B023
        run.kill().wait(-signal.SIGKILL)
    run = start_ranks(*settings).wait(0)
    assert "stage domain: already complete" in run.output and "resuming from step" in run.output
    assert run.losses() == undisturbed.losses()
    assert weights(run.folder) == weights(undisturbed.folder)


def test_kill_in_the_second_of_several_adapters(start_ranks, weights) -> None:
    rows = ("task", "task-heldout")
    several = {r: {"sources": [{"path": f"dtrain:tiny-text/{r}.json"}]} for r in rows}
    settings = [f"stages.task.adapters={json.dumps(several)}", "output.merge=false"]
    settings += ["engine.kind=ddp", *EVERY_STEP, "stages.domain.train.steps=5"]
    settings += ["stages.task.data={sequence_length: 128}"]
    undisturbed = start_ranks(*settings, folder="undisturbed").wait(0)
    run = start_ranks(*settings)
    run.until(lambda: run.is_at("task-task-heldout", 3))
    run.kill().wait(-signal.SIGKILL)
    run = start_ranks(*settings).wait(0)
    assert "stage task-task: already complete" in run.output
    assert "resuming from step" in run.output
    assert weights(run.folder) == weights(undisturbed.folder)
    parents = {a["name"]: a["made_from"]["parent"] for a in run.json("lineage.json")["artifacts"]}
    assert parents["task-task"] == parents["task-task-heldout"] != parents["domain"]
    losses = run.json("evaluation.json")["losses"]["task"]
    assert list(losses) == ["base", "domain", "task-task", "task-task-heldout"]


def test_ranks_engines_and_micro_batches_change_in_one_run(start_ranks) -> None:
    legs = [("ddp", 2), ("fsdp2", 1), ("zero2", 2), ("zero3", 4), ("fsdp2", 2), ("zero3", 1)]
    for engine, ranks in legs:
        run = start_ranks(f"engine.kind={engine}", ranks=ranks, env=STOP_AT_ONCE).wait(75)
        assert run.json("outcome.json")["outcome"] == "interrupted"
    micro = [f"stages.{stage}.train.micro_batch_size=2" for stage in ("domain", "task")]
    run = start_ranks("engine.kind=ddp", *micro, ranks=2).wait(0)
    assert f"resuming from step {len(legs)}" in run.output
    run.assert_golden("lora")


@pytest.mark.parametrize(
    "changes",
    [
        ["method={kind: full}"],
        ["method={kind: qlora, r: 4, dropout: 0.1}"],
        # Matrices of 4096 elements: smaller ones keep a state of 32 bits.
        ["method={kind: lora, r: 64}", "train.optimizer=adamw_8bit", "train.learning_rate=1e-3"],
    ],
    ids=["full", "qlora", "adamw_8bit"],
)
def test_other_methods_resume(start_ranks, weights, changes) -> None:
    settings = ["engine.kind=ddp"]
    settings += [f"stages.{s}.{change}" for s in ("domain", "task") for change in changes]
    undisturbed = start_ranks(*settings, ranks=1, folder="undisturbed").wait(0)
    start_ranks(*settings, ranks=1, env=STOP_AT_ONCE).wait(75)
    run = start_ranks(*settings, ranks=1).wait(0)
    assert weights(run.folder) == weights(undisturbed.folder)


def test_signal_stops_the_run_and_a_second_run_is_rejected(dtrain_run) -> None:
    settings = [*EVERY_STEP, "stages.domain.train.steps=60"]  # the second start takes seconds
    live = dtrain_run(*settings)
    live.until_step("domain", 1)
    recipe = (live.folder / "recipe.yaml").read_bytes()
    second = dtrain_run("seed=7").wait(2)
    assert "another run is using this folder" in second.output
    assert (live.folder / "recipe.yaml").read_bytes() == recipe
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):  # repeated signals are harmless
        live.process.send_signal(number)
    live.wait(75)
    saved = r"stopped as asked: saved stage (domain|task) at step \d+; the same command resumes"
    assert re.search(rf"^\d\d:\d\d:\d\d {saved}$", live.output, re.MULTILINE)
    outcome = live.json("outcome.json")
    assert len(outcome.pop("start")) == 32
    assert outcome == {
        "outcome": "interrupted",
        "status": 75,
        "reason": "asked to stop; start it again to resume",
    }
    (live.folder / "stop").touch()  # left over from this stop; the next run ignores it
    again = dtrain_run(*settings).wait(0)
    assert "resuming from step" in again.output
    assert again.json("outcome.json")["outcome"] == "finished"


def test_ctrl_c_before_the_training_is_one_line(dtrain_run) -> None:
    live = dtrain_run()

    def is_importing() -> bool:
        worker = live.worker(0)
        return worker is not None and any("libtorch" in m.path for m in worker.memory_maps())

    live.until(is_importing)
    live.process.send_signal(signal.SIGINT)
    live.wait(130)
    lines = [line for line in live.output.splitlines() if line]
    assert lines == ["interrupted before the training; the same command starts it again"]


def test_stop_file_stops_the_run_once(start_ranks) -> None:
    run = start_ranks()
    run.folder.mkdir(exist_ok=True)
    (run.folder / "stop").touch()
    run.wait(75)
    assert not (run.folder / "stop").exists()
    assert len([r for r in run.records("domain") if "loss" in r]) == 1


def test_restarting_launcher_replaces_a_killed_worker(dtrain_run, start_ranks, weights) -> None:
    undisturbed = start_ranks(*EVERY_STEP, folder="undisturbed").wait(0)
    launcher = [sys.executable, "-m", "dtrain.torchrun", "--standalone", "--nproc-per-node=2"]
    launcher += ["--max-restarts=2", "-m", "dtrain.train"]
    live = dtrain_run(*EVERY_STEP, launcher=launcher)
    live.until_step("domain", 3)
    live.worker(1).kill()
    live.wait(0)
    assert "resuming from step" in live.output
    assert weights(live.folder) == weights(undisturbed.folder)


def test_lengthening_a_finished_stage_rewrites_its_results(start_ranks, weights) -> None:
    settings = ["stages.domain.train.lr_scheduler=constant", "evaluation={sets: {}}"]
    settings += [
        f"stages.{stage}.train.{key}=null"
        for stage in ("domain", "task")
        for key in ("evaluate_on", "evaluate_every_steps")
    ]
    steps = "stages.domain.train.steps"
    long = start_ranks(*settings, f"{steps}=8", ranks=1, folder="long").wait(0)
    start_ranks(*settings, f"{steps}=4", ranks=1, folder="run", env={}).wait(0)
    (long.folder.parent / "run/task").rename(long.folder.parent / "task of the shorter one")
    refused = start_ranks(*settings, f"{steps}=8", ranks=1).wait(2)
    assert "train.steps: 4 in the checkpoint, 8 now" in refused.output
    allow = ["--allow-change", "train.steps"]
    run = start_ranks(*settings, f"{steps}=8", ranks=1, options=allow).wait(0)
    assert "allowed to change: train.steps" in run.output
    assert weights(run.folder) == weights(long.folder)
