"""Configs of other tools become recipes that dtrain can check and plan, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dtrain.cli import app
from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.importing.foreign_config import ForeignConfig, Note
from dtrain.importing.import_config import import_config, recipe_text, report
from dtrain.pipeline.input_checks import check_inputs
from dtrain.planning.gpus import find_gpu
from dtrain.planning.plan import make_plan
from dtrain.planning.workload import Cluster

CONFIGS = Path(__file__).with_name("configs")
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.y*ml"))


def recipe_of(name: str, processes: int = 1) -> Recipe:
    text = recipe_text(import_config(Path(name), processes))
    Path("out.yaml").write_text(text)
    return load_recipe("out.yaml")


def note_of(config: ForeignConfig, key: str) -> Note:
    [note] = [note for note in config.notes if note.key == key]
    return note


def values_of(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump()
    return {**values, **{name: values["stages"][0][name] for name in values["stages"][0]}}


def test_there_are_three_configs_of_each_tool() -> None:
    tools = [name.partition("/")[0] for name in FILES]
    assert all(tools.count(tool) >= 3 for tool in ("axolotl", "llama_factory", "trl"))


@pytest.mark.parametrize("name", FILES)
def test_the_recipe_passes_check_and_plan(workspace: Path, name: str) -> None:
    recipe = recipe_of(name)
    check_inputs(recipe).raise_errors()
    plan = make_plan(recipe, Cluster(find_gpu("h100-80g"), 1, 1))
    assert plan is not None


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_the_file_is_in_the_report(workspace: Path, name: str) -> None:
    config = import_config(Path(name), 1)
    text = "\n".join(report(config))
    groups = {"datasets", "test_datasets", "pretraining_dataset", "dataset", "eval_dataset"}
    assert config.values.keys() - groups <= {note.key for note in config.notes}
    assert all(key in text for key in config.values.keys() - groups)
    assert "dtrain has no such setting" not in text.replace("no such setting:", "")


EXPECTED: dict[str, dict[str, Any]] = {
    "axolotl/qlora.yml": {
        "method": {"kind": "qlora", "r": 8, "alpha": 16.0, "target_modules": "all-linear"},
        "data": {"sequence_length": 128, "packing": True, "template": "instruction"},
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "steps": 5,
            "warmup_ratio": 0.2,
            "learning_rate": 2e-4,
            "optimizer": "adamw",
        },
    },
    "axolotl/full-chat-zero3.yml": {
        "engine": {"kind": "zero3", "offload": True},
        "method": {"kind": "full"},
        "data": {"overlong": "truncate"},
        "train": {
            "optimizer": "adamw",
            "min_lr_ratio": 0.1,
            "evaluate_every_steps": 10,
            "checkpoint_every_steps": 10,
            "early_stopping_patience": 3,
        },
        "output": {"folder": "./outputs/full", "keep_checkpoints": 3, "use": "best"},
    },
    "axolotl/dpo.yml": {
        "engine": {"kind": "fsdp2"},
        "kind": "dpo",
        "method": {"kind": "rslora", "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]},
        "preference": {"beta": 0.2, "sft_weight": 0.5, "loss": "sigmoid"},
    },
    "axolotl/completion.yml": {
        "kind": "cpt",
        "method": {"kind": "full"},
        "train": {"lr_scheduler": "constant", "warmup_ratio": 0.0, "optimizer": "lion_8bit"},
    },
    "llama_factory/lora_sft.yaml": {
        "model": {"gradient_checkpointing": True, "trust_remote_code": True},
        "method": {"kind": "dora", "r": 8, "alpha": 16.0, "dropout": 0.0},
        "data": {"train_on": "last", "packing": False},
        "train": {"global_batch_size": 8, "steps": 5, "epochs": None, "evaluate_every_steps": 5},
        "output": {"merge": False},
    },
    "llama_factory/full_pt_ds2.yaml": {
        "engine": {"kind": "zero2"},
        "kind": "cpt",
        "data": {"packing": True},
        "train": {"min_lr_ratio": 0.1, "warmup_ratio": 0.1, "checkpoint_every_steps": None},
    },
    "llama_factory/kto.yaml": {
        "kind": "kto",
        "method": {"kind": "qlora"},
        "preference": {"desirable_weight": 1.5, "undesirable_weight": 1.0, "beta": 0.1},
        "monitoring": {"report_to": ["tensorboard"]},
    },
    "llama_factory/simpo.yaml": {
        "kind": "simpo",
        "method": {"kind": "full", "trainable_layers": 1},
        "preference": {"beta": 2.5, "target_margin": 0.8},
        "train": {"lr_scheduler": "linear", "warmup_ratio": 0.0, "weight_decay": 0.0},
    },
    "trl/sft_lora.yaml": {
        "kind": "sft",
        "method": {"kind": "lora", "r": 8, "dropout": 0.05},
        "data": {"train_on": "all+user+tool", "packing": True},
        "train": {"global_batch_size": 4, "lr_scheduler": "linear"},
    },
    "trl/sft_text.yaml": {
        "kind": "cpt",
        "method": {"kind": "full"},  # lora_r alone does not make TRL use LoRA
        "train": {"micro_batch_size": 8, "learning_rate": 2e-5, "optimizer": "adafactor"},
    },
    "trl/dpo.yaml": {
        "kind": "dpo",
        "method": {"kind": "qlora", "alpha": 32.0},
        "preference": {"loss": "sigmoid", "sft_weight": 0.5, "precompute_reference": True},
        "train": {"epochs": 3.0, "learning_rate": 5e-7},
    },
}


@pytest.mark.parametrize("name", FILES)
def test_values_are_those_that_the_tool_would_use(workspace: Path, name: str) -> None:
    values = values_of(recipe_of(name))
    for group, expected in EXPECTED[name].items():
        found = values[group]
        if isinstance(expected, dict):
            found = {key: found[key] for key in expected}
        assert found == expected, group


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        (
            "axolotl/qlora.yml",
            [
                {"path": "data/alpaca.jsonl", "format": "alpaca"},
                {
                    "path": "data/qa.jsonl",
                    "format": "alpaca",
                    "columns": {"instruction": "question", "output": "answer"},
                },
            ],
        ),
        (
            "llama_factory/lora_sft.yaml",
            [
                {"path": "llama_factory/data/alpaca.jsonl", "format": "alpaca", "weight": 0.75},
                {
                    "path": "llama_factory/data/chats.jsonl",
                    "format": "sharegpt",
                    "columns": {"conversations": "turns"},
                    "weight": 0.25,
                },
            ],
        ),
        (
            "trl/sft_text.yaml",
            [
                {
                    "path": path,
                    "format": "text",
                    "columns": {"text": "content"},
                    "weight": weight,
                }
                for path, weight in (("data/texts.jsonl", 0.8), ("data/more.txt", 0.2))
            ],
        ),
    ],
)
def test_datasets_become_sources(workspace: Path, name: str, sources) -> None:
    assert import_config(Path(name), 1).stage["data"]["sources"] == sources


def test_processes_multiply_the_batch(workspace: Path) -> None:
    recipe = recipe_of("axolotl/qlora.yml", processes=8)
    assert recipe.stages[0].train.global_batch_size == 32 and recipe.launch.processes == 8


@pytest.mark.parametrize(
    ("name", "key", "outcome", "words"),
    [
        ("axolotl/qlora.yml", "learning_rate", "same", ""),
        ("axolotl/qlora.yml", "sequence_len", "renamed", ""),
        ("axolotl/qlora.yml", "gradient_accumulation_steps", "computed", "2 at once x 2"),
        ("axolotl/qlora.yml", "val_set_size", "left out", "evaluation.sets"),
        ("axolotl/qlora.yml", "load_in_8bit", "off", ""),
        ("axolotl/dpo.yml", "load_in_8bit", "left out", "16 bits"),
        ("axolotl/dpo.yml", "warmup_steps", "changed", "10 / steps"),
        ("axolotl/dpo.yml", "embedding_lr_scale", "left out", "linear layers only"),
        ("axolotl/full-chat-zero3.yml", "optimizer", "changed", "zero3 shards"),
        ("llama_factory/lora_sft.yaml", "template", "changed", "jinja"),
        ("trl/sft_text.yaml", "lora_r", "left out", "TRL trains all weights"),
    ],
)
def test_what_became_of_a_key_and_why(workspace: Path, name, key, outcome, words) -> None:
    note = note_of(import_config(Path(name), 1), key)
    assert note.outcome == outcome and words in note.why


def test_new_tokens_are_taken_over(workspace: Path) -> None:
    text = (workspace / "axolotl" / "qlora.yml").read_text()
    (workspace / "axolotl" / "own.yml").write_text(text + "tokens: [<a>, <b>]\n")
    tokens = recipe_of("axolotl/own.yml").model.tokens
    assert tokens is not None and tokens.add == ["<a>", "<b>"]
    text = (workspace / "llama_factory" / "lora_sft.yaml").read_text()
    (workspace / "llama_factory" / "own.yaml").write_text(text + "add_special_tokens: <a>,<b>\n")
    note = note_of(import_config(Path("llama_factory/own.yaml"), 1), "add_special_tokens")
    assert note.outcome == "changed" and "plain added tokens" in note.why


def test_a_deepspeed_file_beside_the_config_decides_the_engine(workspace: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    (workspace / "axolotl" / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    text = (workspace / "axolotl" / "qlora.yml").read_text()
    (workspace / "axolotl" / "own.yml").write_text(text + "deepspeed: own.json\n")
    engine = recipe_of("axolotl/own.yml").engine
    assert (engine.kind, engine.offload) == ("zero3", True)


@pytest.mark.parametrize(
    ("line", "engine"),
    [
        ("accelerate_config: zero3", ("zero3", False)),
        ("accelerate_config: fsdp2", ("fsdp2", False)),
        ("accelerate_config: multi_gpu", ("auto", False)),
        ("deepspeed: examples/deepspeed/ds_z3_offload_config.json", ("zero3", True)),
        ("deepspeed: deepspeed_configs/zero1.json", ("zero2", False)),
        ("deepspeed: {zero_optimization: {stage: 2}}", ("zero2", False)),
        ("fsdp: full_shard auto_wrap", ("fsdp2", False)),
    ],
)
def test_an_engine_is_found_by_its_name(workspace: Path, line: str, engine) -> None:
    text = (workspace / "trl" / "sft_lora.yaml").read_text()
    (workspace / "own.yaml").write_text(f"{text}\n{line}\n")
    found = recipe_of("own.yaml").engine
    assert (found.kind, found.offload) == engine


def test_a_secret_is_not_shown(workspace: Path) -> None:
    text = (workspace / "trl" / "sft_lora.yaml").read_text()
    (workspace / "own.yaml").write_text(text + "\nhub_token: hf_1234\nswanlab_api_key: abcd\n")
    config = import_config(Path("own.yaml"), 1)
    shown = "\n".join([*report(config), recipe_text(config)])
    assert "hub_token: (a secret)" in shown and "hf_1234" not in shown and "abcd" not in shown


AXOLOTL = "base_model: x\nsequence_len: 64\nmicro_batch_size: 1\nlearning_rate: 1e-4\n"
TRL = "model_name_or_path: x\ndataset_name: data/own.jsonl\n"
FACTORY = "model_name_or_path: x\ncutoff_len: 64\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "is no config of a known tool"),
        ("model: {base: x}\nstages: []\n", "is a recipe of dtrain already"),
        ("model: {_component_: torchtune.models.llama2_7b}\n", "torchtune's configs"),
        (AXOLOTL + "rl: grpo\n", "grpo has no counterpart"),
        (AXOLOTL + "datasets: [{path: a, type: input_output}]\n", "rows of segments"),
        (AXOLOTL + "adapter: llama-adapter\n", "does not train llama-adapter"),
        (FACTORY + "stage: ppo\ndataset: a\n", "ppo has no counterpart"),
        (FACTORY + "stage: sft\ndataset: nowhere\n", "nowhere is not described"),
        (FACTORY + "stage: sft\nfinetuning_type: oft\ndataset: texts\n", "does not train oft"),
        (FACTORY + "stage: dpo\npref_loss: kto_pair\ndataset: pairs\n", "kto_pair has no"),
        (TRL + "num_generations: 8\n", "generates answers"),
        (TRL + "loss_type: sppo_hard\n", "have no counterpart"),
        ("model_name_or_path: x\nuse_peft: true\n", "names no dataset"),
        ("base_model:\nsequence_len: 64\nadapter: lora\n", "names no base model"),
        ("a: [1\n", "is not valid YAML"),
    ],
)
def test_what_cannot_be_imported_is_refused(workspace: Path, text: str, message: str) -> None:
    path = workspace / "llama_factory" / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        import_config(path, 1)
    assert "config.yaml" in str(caught.value) or "dataset_info.json" in str(caught.value)


BROKEN = {
    "datasets": "[1, null]",
    "learning_rate": "high",
    "lr_groups": "{a: 1}",
    "deepspeed": "7",
    "lora_target_modules": "{a: 1}",
    "micro_batch_size": "[1]",
    "max_steps": "many",
    "lr_scheduler_kwargs": "{min_lr: low}",
    "chat_template_jinja": "{{ a }}",
    "output_dir": "[a]",
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_value_of_a_wrong_type_is_no_crash(workspace: Path, key: str) -> None:
    lines = [line for line in AXOLOTL.splitlines() if not line.startswith(key)]
    text = "\n".join([*lines, f"{key}: {BROKEN[key]}", "adapter: lora", ""])
    (workspace / "broken.yml").write_text(text)
    result = CliRunner().invoke(app, ["import", "broken.yml", "out.yaml"])
    assert result.exception is None or isinstance(result.exception, UserError | SystemExit)


def test_the_command_writes_reports_and_never_overwrites(workspace: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["import", "trl/dpo.yaml"])
    assert done.exit_code == 0 and "wrote dpo-dtrain.yaml" in done.output
    assert "trl/dpo.yaml is a config of TRL" in done.output
    assert load_recipe("dpo-dtrain.yaml").stages[0].kind == "dpo"
    written = Path("dpo-dtrain.yaml").read_text()
    assert "# Changed: stages.dpo.method.target_modules" in written
    again = runner.invoke(app, ["import", "trl/dpo.yaml"])
    assert isinstance(again.exception, UserError) and "exists already" in str(again.exception)
    assert Path("dpo-dtrain.yaml").read_text() == written


def test_the_command_says_what_check_would_refuse(workspace: Path) -> None:
    text = AXOLOTL + "datasets: [{path: data/texts.jsonl, type: reflection}]\nmax_steps: 5\n"
    (workspace / "own.yml").write_text(text)
    done = CliRunner().invoke(app, ["import", "own.yml", "out.yaml"])
    assert done.exit_code == 2 and Path("out.yaml").exists()
    assert "to correct in it" in done.stderr
    assert "no known format has the columns content" in done.stderr
