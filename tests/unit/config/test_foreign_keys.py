"""Recipes of other tools: each key is answered with dtrain's key, or with why there is none."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from dtrain.config.foreign_answers import ANSWERS
from dtrain.config.foreign_keys import EQUIVALENTS, KEYS, SENTENCES, answer, equivalent
from dtrain.config.load import load_recipe
from dtrain.config.schema_paths import key_owners
from dtrain.core.errors import UserErrors

LLAMA_FACTORY = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.1
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
packing: true
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
save_total_limit: 3
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
max_steps: 100
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
flash_attn: fa2
deepspeed: examples/deepspeed/ds_z3_config.json
ddp_timeout: 180000000
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
KINDS = "use stages[], each with a kind: cpt, sft, distill, dpo, kto, orpo, simpo, cpo"
LOGGED = "every step is logged: to metrics.jsonl and report.html in output.folder"
ANSWERS_TO_LLAMA_FACTORY = {
    "model_name_or_path": "use model.base",
    "quantization_bit": "use stages[].method.kind: qlora, whose base is quantized to 4 bits (NF4)",
    "trust_remote_code": "use model.trust_remote_code",
    "stage": KINDS,
    "do_train": KINDS,
    "finetuning_type": "use stages[].method.kind",
    "lora_rank": "use stages[].method.r",
    "lora_alpha": "use stages[].method.alpha",
    "lora_dropout": "use stages[].method.dropout",
    "lora_target": "use stages[].method.target_modules",
    "dataset": "use stages[].data.sources",
    "template": "use stages[].data.template",
    "cutoff_len": "use stages[].data.sequence_length",
    "max_samples": "dtrain has no such setting: cut the source file instead",
    "overwrite_cache": "nothing is overwritten: choose another output.folder for another run",
    "preprocessing_num_workers": "dtrain chooses the number of workers; `dtrain data prepare "
    "--processes N` sets it",
    "packing": "use stages[].data.packing",
    "output_dir": "use output.folder",
    "logging_steps": LOGGED,
    "save_steps": "use stages[].train.checkpoint_every_steps",
    "save_total_limit": "use output.keep_checkpoints",
    "plot_loss": LOGGED,
    "overwrite_output_dir": "nothing is overwritten: choose another output.folder for another run",
    "report_to": "use monitoring.report_to",
    "per_device_train_batch_size": "use stages[].train.micro_batch_size",
    "gradient_accumulation_steps": "gradient accumulation follows from global_batch_size, "
    "micro_batch_size and the number of ranks",
    "learning_rate": "use stages[].train.learning_rate",
    "num_train_epochs": "use stages[].train.epochs",
    "max_steps": "use stages[].train.steps",
    "lr_scheduler_type": "use stages[].train.lr_scheduler",
    "warmup_ratio": "use stages[].train.warmup_ratio",
    "bf16": "use model.dtype: bfloat16; float16 is not supported",
    "flash_attn": "use model.attention",
    "deepspeed": "use engine.kind: zero2 or zero3, and engine.config for a DeepSpeed JSON file",
    "ddp_timeout": "use engine.kind: ddp, which has no settings of its own",
    "val_size": "put held-out rows into a file of their own and name it in evaluation.sets: "
    "dtrain does not split a source",
    "per_device_eval_batch_size": "evaluation uses stages[].train.micro_batch_size",
    "eval_strategy": "use stages[].train.evaluate_every_steps",
    "eval_steps": "use stages[].train.evaluate_every_steps",
}

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
train_on_inputs: false
wandb_project: demo
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
lr: 0.0002
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
fsdp: [full_shard]
"""
ANSWERS_TO_AXOLOTL = {
    "base_model": "use model.base",
    "load_in_4bit": "use stages[].method.kind: qlora, whose base is quantized to 4 bits (NF4)",
    "datasets": "use stages[].data.sources",
    "adapter": "use stages[].method.kind",
    "lora_r": "use stages[].method.r",
    "lora_target_linear": "use stages[].method.target_modules",
    "sequence_len": "use stages[].data.sequence_length",
    "sample_packing": "use stages[].data.packing",
    "eval_sample_packing": "use stages[].data.packing",
    "train_on_inputs": "use stages[].data.train_on",
    "wandb_project": "use monitoring.project",
    "micro_batch_size": "use stages[].train.micro_batch_size",
    "num_epochs": "use stages[].train.epochs",
    "optimizer": "use stages[].train.optimizer",
    "lr_scheduler": "use stages[].train.lr_scheduler",
    "lr": "use stages[].train.learning_rate",
    "gradient_checkpointing": "use model.gradient_checkpointing",
    "flash_attention": "use model.attention",
    "warmup_steps": "use stages[].train.warmup_ratio, the share of the steps with a rising "
    "learning rate",
    "evals_per_epoch": "use stages[].train.evaluate_every_steps",
    "saves_per_epoch": "use stages[].train.checkpoint_every_steps",
    "weight_decay": "use stages[].train.weight_decay",
    "special_tokens": "dtrain does not change the base's own tokens",
    "model_type": "the base model's own files decide it",
    "fsdp": "use engine.kind: fsdp2; it wraps every decoder layer by itself",
}

GOOD = """\
name: small
model: {base: some/folder}
stages:
  - name: task
    kind: sft
    method: {kind: lora, r: 8}
    data: {sources: [{path: a.json, format: alpaca}]}
    train: {global_batch_size: 4, steps: 2}
evaluation:
  sets: {task: {kind: sft, sources: [{path: b.json, format: alpaca}]}}
output: {folder: runs/small}
"""


@pytest.fixture
def answers(tmp_path):
    def answers_to(text: str, *overrides: str) -> dict[str, str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(UserErrors) as caught:
            load_recipe(str(path), overrides)
        problems = [p for p in caught.value.errors if p.message.endswith(": unknown key")]
        return {p.message.removesuffix(": unknown key"): p.fix for p in problems}

    return answers_to


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [(LLAMA_FACTORY, ANSWERS_TO_LLAMA_FACTORY), (AXOLOTL, ANSWERS_TO_AXOLOTL)],
    ids=["llama-factory", "axolotl"],
)
def test_every_key_of_a_foreign_recipe_has_an_answer(answers, recipe, expected) -> None:
    fixes = answers(recipe)
    assert {key: fixes[key] for key in expected} == expected
    assert not any(fix.startswith(("known here", "did you mean")) for fix in fixes.values())


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("stages.0.train.per_device_train_batch_size=1", "use micro_batch_size"),
        ("stages.0.data.cutoff_len=8", "use sequence_length"),
        ("evaluation.sets.task.max_length=8", "use sequence_length"),
        ("stages.0.method.lora_alpha=8", "use alpha"),
        ("stages.0.adapter=lora", "use stages[].method.kind"),
        ("stages.0.learning_rate=1e-4", "use stages[].train.learning_rate"),
        ("stages.0.data.sources.0.train_on_split=a", "use split"),
        ("output.save_total_limit=1", "use keep_checkpoints"),
    ],
)
def test_answer_matches_the_group_of_the_key(answers, override, fix) -> None:
    assert answers(GOOD, override) == {override.partition("=")[0]: fix}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stages.0.train.warmup_share=0.1", "warmup_ratio"),
        ("stages.0.train.clip_norm=1", "max_grad_norm"),
        ("stages.0.train.global_batch_sequences=4", "global_batch_size"),
        ("stages.0.train.micro_batch_sequences=4", "micro_batch_size"),
        ("stages.0.train.schedule=cosine", "lr_scheduler"),
        ("stages.0.data.sequence_tokens=64", "sequence_length"),
        ("stages.0.method.targets=all-linear", "target_modules"),
        ("stages.0.data.replay={path: a.json, share: 0.1}", "ratio"),
    ],
)
def test_a_similar_key_is_proposed(answers, override, key) -> None:
    [fix] = answers(GOOD, override).values()
    assert key in fix


def test_string_where_a_group_belongs_is_shown_as_a_group(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace("{base: some/folder}", "some/folder"))
    with pytest.raises(UserErrors) as caught:
        load_recipe(str(path))
    [problem] = caught.value.errors
    assert problem.message == "model must be a group of keys, not 'some/folder'"
    assert problem.fix == "write model: {base: some/folder}"


def test_the_table_names_keys_of_the_schema_and_each_foreign_key_once() -> None:
    assert set(EQUIVALENTS) <= set(key_owners())
    names = [n for text in (*EQUIVALENTS.values(), *ANSWERS.values()) for n in text.split()]
    assert len(names) == len(set(names)) == len(KEYS) + len(SENTENCES)


def known_here() -> set[str]:
    return {path.rpartition(".")[2].removesuffix("[]") for path in key_owners()}


def unanswered(names: set[str]) -> set[str]:
    return {n for n in names - known_here() if not (answer(n) or equivalent(n))}


def fields_of(package: str, file: str, *classes: str) -> set[str]:
    """The fields of dataclasses, read from the source: the packages take seconds to import."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / file).read_text("utf-8"))
    bodies = [x.body for x in ast.walk(tree) if isinstance(x, ast.ClassDef) and x.name in classes]
    assert len(bodies) == len(classes)
    fields = [x.target for body in bodies for x in body if isinstance(x, ast.AnnAssign)]
    return {target.id for target in fields if isinstance(target, ast.Name)}


@pytest.mark.parametrize(
    "config_class",
    [
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("trl", "trainer/dpo_config.py", "DPOConfig"),
        ("trl", "trainer/model_config.py", "ModelConfig"),
        ("trl", "scripts/utils.py", "ScriptArguments"),
    ],
    ids=lambda config_class: config_class[2],
)
def test_every_key_of_trl_has_an_answer(config_class) -> None:
    fields = fields_of(*config_class)
    assert len(fields) > 4 and not unanswered(fields)


# Of PEFT's LoRA, what names other methods, or is written by PEFT itself.
OF_PEFT_ALONE = {"kasa_config", "velora_config", "monteclora_config", "arrow_config"}


def test_every_key_of_pefts_lora_has_an_answer() -> None:
    fields = fields_of("peft", "tuners/lora/config.py", "LoraConfig")
    assert len(fields) > 20 and unanswered(fields) <= OF_PEFT_ALONE


SECTIONS = Path(__file__).with_name("peer_keys.txt").read_text("utf-8").split("\n[")[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("]")[0])
def test_every_key_of_the_public_examples_has_an_answer(section) -> None:
    names = set(section.partition("]")[2].split())
    assert len(names) > 50 and not unanswered(names)


@pytest.mark.parametrize(
    ("key", "answered"),
    [
        ("liger_rms_norm", "model.kernels"),
        ("fsdp_cpu_offload", "engine.offload"),  # before fsdp_*
        (
            "fsdp_sharding_strategy",
            "use engine.kind: fsdp2; it wraps every decoder layer by itself",
        ),
        ("field_instruction", "stages[].data.sources[].columns"),
    ],
)
def test_a_beginning_of_a_name_answers_all_that_begin_so(key, answered) -> None:
    assert (equivalent(key) or answer(key)) == answered


def test_no_beginning_covers_a_key_of_the_schema() -> None:
    beginnings = tuple(name[:-1] for name in (*KEYS, *SENTENCES) if name.endswith("*"))
    assert not [name for name in known_here() if name.startswith(beginnings)]
