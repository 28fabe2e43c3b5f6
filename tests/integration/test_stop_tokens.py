"""A result stops and is asked as it was trained: by dtrain, by plain transformers, by vLLM's words.

The base is as Qwen's are: its end of text is another token than the one that closes a turn.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

from dtrain.cli import app
from dtrain.samples.make import ensure
from dtrain.serving.run_models import open_run
from dtrain.serving.vllm import script

ROOT = Path(__file__).parents[2]
CLOSE, OWN_END = 3, 0  # <|im_end|>, <|pad|>
QUESTION, ANSWER = "Which color is hen 1?", "The hen is red."
TEMPLATE = (
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '!\\n' + m.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant!\\n' -}}{%- endif -%}"
)
RECIPE = """
name: hens
model: {base: base, dtype: float32}
launch: {processes: 1}
stages:
  - name: task
    kind: sft
    method: {kind: lora, r: 32, target_modules: all-linear}
    data: {sequence_length: 256, sources: [{path: rows.jsonl}], template: chat.jinja}
    train: {global_batch_size: 2, steps: 80, learning_rate: 1.0e-2, lr_scheduler: constant}
  - name: more
    kind: cpt
    method: {kind: lora, r: 2}
    data: {sequence_length: 64, sources: [{path: texts.jsonl}]}
    train: {global_batch_size: 1, steps: 1, learning_rate: 1.0e-6}
evaluation: {generation: {hens: {path: questions.jsonl, max_new_tokens: 40}}}
output: {folder: run}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: chats under a template of the recipe, then plain text."""
    folder = tmp_path_factory.mktemp("hens")
    shutil.copytree(ensure("tiny-llama"), folder / "base")
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<|pad|>"),
        ("config.json", "eos_token_id", OWN_END),
        ("generation_config.json", "eos_token_id", OWN_END),
    ):
        path = folder / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (folder / "chat.jinja").write_text(TEMPLATE)
    (folder / "recipe.yaml").write_text(RECIPE)
    chats = [
        [
            {"role": "user", "content": f"Which color is hen {number}?"},
            {"role": "assistant", "content": ANSWER},
        ]
        for number in range(12)
    ]
    lines(folder / "rows.jsonl", [{"messages": chat} for chat in chats])
    lines(folder / "texts.jsonl", [{"text": "A hen sleeps and a fox walks around. " * 3}] * 9)
    lines(folder / "questions.jsonl", [{"prompt": QUESTION, "reference": ANSWER}])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dtrain.train", "recipe.yaml"]
    subprocess.run(command, cwd=folder, check=True, timeout=240, env=environment)
    return folder / "run"


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def merge(*paths: Path) -> Path:
    done = CliRunner().invoke(app, ["merge", *map(str, paths)])
    assert done.exit_code == 0, done.output
    return paths[-1]


def check(model: Path) -> None:
    """The end of a turn is added to the base's own end, and the template is the recipe's."""
    config = json.loads((model / "generation_config.json").read_text())
    assert config["eos_token_id"] == [OWN_END, CLOSE]
    assert (model / "chat_template.jinja").read_text() == TEMPLATE
    assert "chat_template" not in json.loads((model / "tokenizer_config.json").read_text())


def test_merged_models_keep_stop_tokens_and_template_through_the_chain(
    run: Path, tmp_path: Path
) -> None:
    check(run / "task" / "merged")
    check(run / "more" / "merged")
    base, task, more = run.parent / "base", run / "task" / "adapter", run / "more" / "adapter"
    check(merge(base, task, tmp_path / "by hand"))
    check(merge(base, task, more, tmp_path / "both"))
    check(merge(run / "task" / "checkpoints" / "step-000080", tmp_path / "of a checkpoint"))


def test_transformers_generate_stops_as_trained(run: Path) -> None:
    merged = run / "more" / "merged"
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(merged)
    chat = [{"role": "user", "content": QUESTION}]
    prompt: Any = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(merged)
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    new = output[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == f"{ANSWER}<|im_end|>"


def test_answers_in_training_use_the_recipe_template_and_stop(run: Path) -> None:
    texts = {}
    for model in ("base", "task", "more"):
        (line,) = (run / "predictions" / f"{model}.jsonl").read_text().splitlines()
        texts[model] = json.loads(line)["answer"]
    assert texts["task"] == texts["more"] == ANSWER and ANSWER not in texts["base"]


@pytest.mark.parametrize("result", [".", "task/adapter", "task/merged", "more/merged"])
def test_generate_stops_for_runs_adapters_and_merged_models(
    result: str, run: Path, tmp_path: Path
) -> None:
    lines(tmp_path / "p.jsonl", [{"prompt": QUESTION}, {"prompt": "Which color is hen 11?"}])
    options = ["--in", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, ["generate", str(run / result), *options])
    assert done.exit_code == 0, done.output
    answers = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(answer)["generated"] for answer in answers] == [ANSWER, ANSWER]


@pytest.mark.parametrize("name", ["", ".default"])
def test_moved_adapter_keeps_its_template(name: str, run: Path, tmp_path: Path) -> None:
    """Also with the adapter's name in the keys, as in a state dict in memory."""
    adapter = tmp_path / "task-adapter"
    shutil.copytree(run / "task" / "adapter", adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace(".weight", f"{name}.weight"): t for k, t in tensors.items()}, file)
    lines(tmp_path / "p.jsonl", [{"prompt": QUESTION}])
    options = ["--in", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, ["generate", str(adapter), *options])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.jsonl").read_text())["generated"] == ANSWER


def test_vllm_command_has_stop_tokens_and_template(run: Path) -> None:
    merged, task, more = script(open_run(run)).split("vllm serve ")[1:]
    folder = run / "task" / "adapter"
    assert f"--generation-config {folder}" in task
    assert f"--chat-template {folder / 'chat_template.jinja'}" in task
    for model in (merged, more):  # a merged model brings both itself
        assert "--generation-config" not in model and "--chat-template" not in model
