"""The output of `dtrain plan`, what `auto` becomes, and calibration by earlier runs."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from dtrain.cli.root import app
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.planning import calibration
from dtrain.planning.choose import resolve
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.fit import DOES_NOT_FIT, FITS, ORDER, TIGHT, assess_fit
from dtrain.planning.gpus import find_gpu
from dtrain.planning.plan import make_plan
from dtrain.planning.render import render_plan
from dtrain.planning.storage import checkpoint_bytes
from dtrain.planning.workload import Cluster
from dtrain.recipes import shipped


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def plan_of(name: str, *overrides: str, gpu: str = "h100-80g", nodes: int = 1, gpus: int = 8):
    return make_plan(load_recipe(name, list(overrides)), Cluster(find_gpu(gpu), nodes, gpus))


@pytest.mark.parametrize("gpu", ["rtx4090", "h100-80g"])
def test_no_line_is_wider_than_the_terminal(gpu: str) -> None:
    for name in shipped():
        plan = plan_of(name, gpu=gpu, gpus=2)
        for columns in (80, 120):
            assert max(len(line) for line in render_plan(plan, columns)) <= columns, name


def test_the_plan_prints_every_figure() -> None:
    length = "stages.task.train={global_batch_size: 32, tokens: 1000000000}"
    done = invoke("plan", "70b-qlora", length, "--nodes", "2", "--gpu", "h100-80g")
    assert done.exit_code == 0
    for text in ("70b-qlora on 2 x 8 h100-80g: FITS", "828,375,040 parameters", "for 1B tokens"):
        assert text in done.output
    for text in (
        "budget",
        "GPU-hours",
        "enter each node",
        "per checkpoint",
        "to merge",
        "best first",
    ):
        assert text in done.output


def test_json_has_the_same_figures() -> None:
    done = invoke("plan", "7b-lora", "--json", "--gpu", "a100-40g")
    output, plan = json.loads(done.output), plan_of("7b-lora", gpu="a100-40g")
    assert output["parameters"] == 7_615_616_512 and output["verdict"] == plan.verdict
    stage = output["stages"][0]
    memory = {k: v for k, v in stage["memory"].items() if k not in ("peak", "moment")}
    assert sum(memory.values()) == pytest.approx(stage["memory"]["peak"])
    assert stage["lower"] < stage["budget"] < stage["usable"]


def test_options_are_complete_and_sorted() -> None:
    plan = plan_of("70b-qlora", nodes=2)
    verdicts = [ORDER.index(option.fit.verdict) for option in plan.options]
    assert verdicts == sorted(verdicts)
    assert {option.workload.method.kind for option in plan.options} == {"full", "lora", "qlora"}
    assert len(plan.options) == 15
    assert plan.options[0].workload.method.kind == "qlora"


def test_a_plan_that_does_not_fit_suggests_changes() -> None:
    plan = plan_of("70b-lora-zero3", gpu="rtx4090")
    assert plan.verdict == DOES_NOT_FIT
    text = "\n".join(render_plan(plan, 100))
    assert "would fit      stages.domain.method.kind=qlora" in text
    arguments = plan.stages[0].suggestions[0].arguments("domain").split()
    assert plan_of("70b-lora-zero3", *arguments, gpu="rtx4090").stages[0].fit.verdict == FITS


LAST_LAYERS = "stages.domain.method={kind: full, trainable_layers: 2}"


@pytest.mark.parametrize(
    ("recipe", "gpu", "overrides"),
    [
        ("30b-a3b-lora", "h100-80g", ["stages.domain.method={kind: full}"]),
        ("gpt-oss-20b-lora", "a100-40g", [LAST_LAYERS, "engine={kind: zero2}"]),
        ("gpt-oss-20b-lora", "h100-80g", ["stages.domain.data.sequence_length=131072"]),
    ],
)
def test_every_suggestion_fits_when_it_is_planned(recipe: str, gpu: str, overrides) -> None:
    stage = plan_of(recipe, *overrides, gpu=gpu).stages[0]
    assert stage.fit.verdict != FITS and stage.suggestions
    for suggestion in stage.suggestions:
        words = shlex.split(suggestion.arguments("domain"))
        options = dict(pairwise(words))
        cluster = {"nodes": int(options.get("--nodes", 1)), "gpu": options.get("--gpu", gpu)}
        keys = [word for word in words if "=" in word]
        changed = plan_of(recipe, *overrides, *keys, **cluster).stages[0]
        assert changed.fit.verdict == FITS, words


def test_compared_methods_keep_the_keys_of_the_recipe() -> None:
    keys = "{kind: lora, r: 16, experts: false, router: train}"
    plan = plan_of("30b-a3b-lora", f"stages.domain.method={keys}", f"stages.task.method={keys}")
    trainable = {x.workload.method.kind: x.workload.trainable for x in plan.options}
    assert trainable["qlora"] == trainable["lora"] == plan.stages[0].workload.trainable


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "q_projj"),
        ("rank_pattern", "{nope: 3}"),
        ("modules_to_save", "down_proj"),
    ],
)
def test_errors_in_a_method_name_its_stage(key: str, value: str) -> None:
    value = value if ":" in value else f"[{value}]"
    with pytest.raises(UserError, match=rf"^stages\.task\.method\.{key}: no "):
        plan_of("30b-a3b-lora", f"stages.task.method.{key}={value}")


def test_embeddings_are_said_to_count_for_a_token() -> None:
    text = " ".join(" ".join(render_plan(plan_of("30b-a3b-lora"), 100)).split())
    assert "30.5B parameters, 3.35B of them for a token, embeddings included" in text


def test_sequences_beyond_the_base_are_said_without_the_base() -> None:
    longer = "stages.task.data.sequence_length=65536"
    done = invoke("plan", "7b-lora", "model.base=meta-llama/Llama-2-7b", longer)
    assert "stages.task.data: sequence_length is 65536, but the model has 4096" in done.stderr
    assert "positions" not in invoke("plan", "7b-lora", longer).stderr


def test_colors_only_on_a_terminal_that_wants_them() -> None:
    command = [sys.executable, "-c", "from dtrain.cli import main; main()", "plan", "tiny"]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    assert b"\x1b[1;32mFITS" in on_terminal(command, environment)
    assert b"\x1b" not in on_terminal(command, environment | {"NO_COLOR": "1"})
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"FITS" in done.stdout and b"\x1b" not in done.stdout


def on_terminal(command: list[str], environment: dict[str, str]) -> bytes:
    """What a command prints on a terminal."""
    outer, inner = pty.openpty()
    process = subprocess.Popen(command, stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    data = b""
    with suppress(OSError):  # the end of a terminal
        while part := os.read(outer, 65536):
            data += part
    os.close(outer)
    assert process.wait() == 0
    return data


def test_the_peak_and_the_least_say_when_they_differ() -> None:
    """Answers may be few: then there are few logits, and the stage needs less than its peak."""
    recipe = "stages.task.data.sequence_length=65536"
    plan = plan_of("7b-qlora", recipe, "model.kernels=off", gpu="l4")
    stage = plan.stages[1]
    assert stage.fit.lower < stage.memory.peak
    text = " ".join(" ".join(render_plan(plan, 200)).split())
    assert "at the peak, when the loss is computed for every token" in text
    assert "if few tokens are targets" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7b-lora", "--gpu", "h10-80g"], "did you mean h100-80g"),
        (["7b-lora", "model.base=/nowhere"], "no config.json"),
        (["7b-lora", "model.base=/models/mine"], "there is no such folder"),
        (["7b-lora", "--nodes", "3"], "cannot be divided by 24 ranks"),
        (
            ["7b-lora", "stages.domain.method.target_modules=[q_prj]"],
            "no linear layer is named 'q_prj'",
        ),
    ],
)
def test_user_errors_are_reported(arguments: list[str], message: str) -> None:
    error = invoke("plan", *arguments).exception
    assert isinstance(error, UserError) and message in str(error)


def test_a_config_of_another_model_than_its_files_is_not_planned(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    planned = plan_of("7b-lora", f"model.base={tmp_path}").shape.parameters  # without files
    weights = {"a": np.zeros(planned, np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    assert plan_of("7b-lora", f"model.base={tmp_path}").shape.parameters == planned
    save_file({"a": weights["a"][1:].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"config.json: describes a model of 1.\d*k parameters .*2 l"
    ):
        plan_of("7b-lora", f"model.base={tmp_path}")


def test_auto_chooses_a_fast_option_that_fits() -> None:
    auto = ["engine={kind: auto}", "stages.domain.train.micro_batch_size=auto"]
    wide, narrow = (Cluster(find_gpu(name), 2, 8) for name in ("h100-80g", "a6000"))
    # 70B in 4 bits: one copy on each 80 GB GPU; on 48 GB shared among the ranks of a node.
    for cluster, engine in ((wide, "ddp"), (narrow, "fsdp2")):
        recipe = resolve(load_recipe("70b-qlora", auto), cluster)
        assert recipe.engine.kind == engine
        assert isinstance(recipe.stages[0].train.micro_batch_size, int)
        plan = make_plan(recipe, cluster)
        assert plan.verdict != DOES_NOT_FIT
    assert recipe.engine.shard == "node"


def test_auto_keeps_explicit_settings() -> None:
    cluster = Cluster(find_gpu("h100-80g"), 1, 8)
    assert resolve(load_recipe("7b-lora"), cluster) == load_recipe("7b-lora")
    strict = load_recipe("7b-lora", ["engine={kind: auto}", "determinism=strict"])
    assert resolve(strict, cluster).engine.kind == "auto"


def test_earlier_runs_correct_a_plan() -> None:
    before = plan_of("7b-lora").stages[0]
    line = calibration.CalibrationRecord(
        gpu="h100-80g",
        engine="ddp",
        method="lora",
        versions=calibration.versions(),
        base="x",
        peak=12e9,
        speed=50.0,
        planned_peak=10e9,
        planned_speed=100.0,
    )
    calibration.append_record(line)
    calibration.append_record(
        calibration.CalibrationRecord(**(vars(line) | {"versions": "torch 1.0", "peak": 9e9}))
    )
    with calibration.calibration_file().open("a") as file:
        file.write("{broken\n")
    after = plan_of("7b-lora").stages[0]
    assert after.correction == calibration.Correction(1, pytest.approx(1.2), pytest.approx(0.5))
    assert after.speed.middle == pytest.approx(before.speed.middle / 2)
    assert after.fit.budget > before.fit.budget
    assert "corrected by 1 stage" in "\n".join(render_plan(plan_of("7b-lora"), 200))
    assert plan_of("7b-lora", gpu="a100-80g").stages[0].correction is None


@pytest.mark.parametrize("name", ["tiny", "quickstart"])
def test_plan_and_job_run_as_many_ranks_as_the_recipe_says(name: str, tmp_path) -> None:
    output = json.loads(invoke("plan", name, "--json").output)
    assert (output["gpus_per_node"], output["verdict"]) == (2, FITS)
    assert json.loads(invoke("plan", "7b-lora", "--json").output)["gpus_per_node"] == 8
    job = invoke("submit", name, f"output.folder={tmp_path / 'run'}", "--dry-run")
    assert f"plan: {FITS} on the largest GPUs" in job.output


def test_submit_skips_the_plan_only_for_an_unknown_shape(tmp_path) -> None:
    run_folder = f"output.folder={tmp_path / 'run'}"
    unknown = invoke("submit", "7b-lora", run_folder, "model.base=me/mine", "--dry-run")
    assert "not planned: " in unknown.output and "#SBATCH" in unknown.output
    wrong = invoke("submit", "70b-qlora", run_folder, "engine.shard=3", "--dry-run").exception
    assert isinstance(wrong, UserError) and "do not divide into groups of 3" in str(wrong)


def test_replayed_tokens_are_counted(tmp_path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 1000)
    data = f"sources: [{{path: {tmp_path}/text.jsonl, format: text}}]"
    replay = f"replay: {{path: {tmp_path}/text.jsonl, format: text, ratio: 0.2}}"
    train = "stages.domain.train={global_batch_size: 64, epochs: 2}"
    amounts = [
        plan_of("7b-lora", train, f"stages.domain.data={{{text}}}").stages[0].tokens
        for text in (data, f"{data}, {replay}")
    ]
    assert amounts[1].tokens == pytest.approx(amounts[0].tokens / 0.8)


def test_permanent_checkpoints_need_disk_space() -> None:
    train = "{global_batch_size: 64, steps: 100, checkpoint_every_steps: 10}"
    some = plan_of("7b-lora", f"stages.domain.train={train}").stages[0]
    more = plan_of("7b-lora", f"stages.domain.train={train}", "output.keep_every_steps=20")
    assert more.stages[0].disk - some.disk == pytest.approx(5 * checkpoint_bytes(some.workload))


def measured_line(engine: str, method: str, ratio: float) -> None:
    calibration.append_record(
        calibration.CalibrationRecord(
            gpu="h100-80g",
            engine=engine,
            method=method,
            versions=calibration.versions(),
            base="x",
            peak=ratio * 40e9,
            speed=1.0,
            planned_peak=40e9,
            planned_speed=1.0,
        )
    )


def test_earlier_runs_correct_options_and_suggestions() -> None:
    """Options, suggestions and choices of `auto` use the same correction as the verdict."""
    before = plan_of("7b-lora")
    measured_line("ddp", "lora", 5.0)
    after = plan_of("7b-lora")
    assert (before.verdict, after.verdict) == (FITS, TIGHT)
    assert after.options[0].engine != "ddp"
    for change in after.stages[-1].suggestions:
        assert assess_fit(change.workload, change.cluster).verdict == FITS
    ddp = [x for x in after.options if (x.engine, x.workload.method.kind) == ("ddp", "lora")]
    assert ddp[0].fit.budget > 3 * build_engine_model(ddp[0].workload).peak_memory().peak


def test_the_plan_prints_the_applied_factor() -> None:
    measured_line("ddp", "lora", 0.5)
    assert "memory x 1.00" in "\n".join(render_plan(plan_of("7b-lora"), 200))


def test_runs_of_small_models_do_not_correct_large_ones() -> None:
    before = plan_of("7b-lora")
    calibration.append_record(
        calibration.CalibrationRecord(
            gpu="h100-80g",
            engine="ddp",
            method="lora",
            versions=calibration.versions(),
            base="dtrain:tiny-llama",
            peak=60e6,  # nearly all of it the workspace of cuBLAS
            speed=5e3,
            planned_peak=1.5e6,
            planned_speed=5e6,
        )
    )
    assert plan_of("7b-lora") == before


def test_broken_calibration_lines_are_skipped() -> None:
    measured_line("ddp", "lora", 1.5)
    good = calibration.calibration_file().read_bytes()
    torn = [
        b"\xff\xfe{",
        b'{"peak": null}',
        b"[1]",
        good.replace(b"60000000000.0", b"null").strip(),
    ]
    calibration.calibration_file().write_bytes(b"\n".join([*torn, good]))
    assert plan_of("7b-lora").stages[0].correction == calibration.Correction(1, 1.5, 1.0)


def test_submit_stops_a_job_that_cannot_fit_unless_forced(tmp_path) -> None:
    run_folder = f"output.folder={tmp_path / 'run'}"
    large = ["submit", "70b-lora-zero3", run_folder, "--gpu", "rtx4090", "--dry-run"]
    error = invoke(*large).exception
    assert isinstance(error, UserError) and "DOES NOT FIT on rtx4090-24g" in str(error)
    assert "method.kind=qlora" in str(error) and "--force" in str(error)
    assert "#SBATCH" in invoke(*large, "--force").output
    fits = invoke(
        "submit", "70b-qlora", run_folder, "--gpu", "h100-80g", "--nodes", "2", "--dry-run"
    )
    assert f"plan: {FITS} on h100-80g" in fits.output


def test_a_term_against_forgetting_costs_time() -> None:
    replay = "stages.task.data.replay={path: general.jsonl, ratio: 0.25}"
    length = "stages.task.train={global_batch_size: 32, steps: 100}"

    def hours(*term: str) -> float:
        stage = plan_of("7b-lora", replay, length, *term).stages[-1]
        assert stage.time.training is not None
        return stage.time.training.middle

    plain = hours()
    on_replay = hours("stages.task.regularize={kind: kl_to_base, weight: 1.0}")
    on_all = hours("stages.task.regularize={kind: kl_to_base, weight: 1.0, on: all}")
    assert 1.2 < on_all / plain < 1.6
    assert on_replay - plain == pytest.approx((on_all - plain) / 4, rel=0.1)
    ewc = hours("stages.task.regularize={kind: ewc, weight: 1.0, sequences: 320}")
    assert ewc == pytest.approx(1.1 * plain)  # the run has 3200
