"""A run's adapters and merged models give the same answers under every loader."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.schema import Model
from dtrain.core.errors import UserError
from dtrain.core.weight_files import weight_files
from dtrain.merge.combine_adapters import combine_adapters
from dtrain.serving.adapter_list import list_adapters
from dtrain.serving.chat import Chat
from dtrain.serving.generate import Answers, generate
from dtrain.serving.generator import TextGenerator
from dtrain.serving.run_models import open_run, served_models

IDS = torch.arange(5, 45)[None]
TOLERANCE = 1e-4


def plain(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stage_base(run: Path) -> str:
    return open_run(run).base


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def greedy(model: torch.nn.Module) -> list[int]:
    return model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False)[0].tolist()


def state(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in weight_files(folder) for name, t in load_file(path).items()}


def test_checkpoint_records_the_training_dtype(run: Path) -> None:
    assert open_run(run).recipe.model.dtype == "auto"
    (step,) = (run / "domain" / "checkpoints").glob("step-*")
    assert Checkpoint.open(step).state["dtype"] == "float32"


def test_chain_equals_two_peft_merges(run: Path) -> None:
    model = plain(stage_base(run))
    for stage in ("domain", "task"):
        model = PeftModel.from_pretrained(model, run / stage / "adapter").merge_and_unload()
        theirs, ours = model.state_dict(), state(run / stage / "merged")
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = state(Path(stage_base(run)))
    assert sum(not torch.equal(ours[n], before[n]) for n in ours) == 14  # 7 layers of 2 blocks


def test_stacked_and_combined_adapters_answer_like_the_merged_model(
    run: Path, tmp_path: Path
) -> None:
    merged = plain(run / "task" / "merged")
    expected, tokens = logits(merged), greedy(merged)
    assert (logits(plain(stage_base(run))) - expected).abs().max() > 100 * TOLERANCE

    stacked = PeftModel.from_pretrained(
        plain(stage_base(run)), run / "domain" / "adapter", "domain"
    )
    stacked.load_adapter(run / "task" / "adapter", "task")
    stacked.base_model.set_adapter(["domain", "task"])
    on_merged = PeftModel.from_pretrained(plain(run / "domain" / "merged"), run / "task/adapter")

    result = combine_adapters(
        run / "domain" / "adapter", run / "task" / "adapter", tmp_path / "both"
    )
    assert result.rank == 8 + 4 and result.error == 0
    combined = PeftModel.from_pretrained(plain(stage_base(run)), tmp_path / "both")
    for model in (stacked, on_merged, combined):
        assert (logits(model.eval()) - expected).abs().max() < TOLERANCE
        assert greedy(model) == tokens
    together = state_of(combined.merge_and_unload())
    assert all(torch.allclose(together[n], t, atol=1e-6) for n, t in merged.state_dict().items())


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def speaker(run: Path) -> TextGenerator:
    choice = served_models(str(run))["task"]
    return TextGenerator(choice, Model(base="of the choice"), torch.device("cpu"))


def test_one_base_in_memory_answers_as_every_stage(run: Path, speaker: TextGenerator) -> None:
    choices = served_models(str(run))
    assert list(choices) == ["base", "domain", "task"]
    models = {name: plain(run / name / "merged") for name in ("domain", "task")}
    models["base"] = plain(stage_base(run))
    for name in ("task", "domain", "base", "task", "base", "domain"):
        speaker.switch(choices[name])
        assert (speaker.logits(IDS) - logits(models[name])).abs().max() < TOLERANCE


def test_incompatible_adapter_is_refused_and_the_previous_stays_active(
    run: Path, speaker: TextGenerator, tmp_path: Path
) -> None:
    choices = served_models(str(run))
    speaker.switch(choices["domain"])
    before = speaker.logits(IDS)
    odd = tmp_path / "odd"
    odd.mkdir()
    config = (run / "task" / "adapter" / "adapter_config.json").read_text()
    (odd / "adapter_config.json").write_text(config.replace('"r": 4', '"r": 5'))
    weights = (run / "task" / "adapter" / "adapter_model.safetensors").read_bytes()
    for content, match in ((weights, "does not fit"), (weights[:-9], "not a whole safetensors")):
        (odd / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=match):
            speaker.switch(type(choices["base"])(choices["base"].base, adapters=(odd,)))
        assert torch.equal(speaker.logits(IDS), before)
    with pytest.raises(UserError, match="there is no folder"):
        speaker.switch(type(choices["base"])(str(tmp_path / "gone")))
    assert torch.equal(speaker.logits(IDS), before)


def test_chat_keeps_its_history_when_switching_adapters(
    run: Path, speaker: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = served_models(str(run))
    speaker.switch(choices["task"])
    chat = Chat(speaker, choices, "task", 6)
    lines = ["hello", "/adapter base", "hello", "/adapter nope", "/adapter", "", "/what", "/quit"]
    chat.run(iter([*lines, "not read"]))
    output = capsys.readouterr().out
    first, second = (turn["content"] for turn in chat.messages[1::2])
    expected = [first, "(base answers now)", second]
    assert [line.strip() for line in output.splitlines()[:3]] == expected
    assert "error: nope: there is no such adapter" in output and "[base] domain task" in output
    assert "/reset forgets" in output and "not read" not in output
    alone = speaker.prompt([{"role": "user", "content": "hello"}])
    speaker.switch(choices["task"])
    assert speaker.answers([alone], 6) == [first]
    speaker.switch(choices["base"])
    assert speaker.answers([speaker.prompt(chat.messages[:3])], 6) == [second]
    chat.run(iter([f"/adapter {run / 'domain' / 'adapter'}"]))  # a name that the run has not
    speaker_of_domain = speaker.logits(IDS)
    speaker.switch(choices["domain"])
    assert torch.equal(speaker.logits(IDS), speaker_of_domain)
    speaker.switch(choices["base"])
    assert not torch.equal(speaker.logits(IDS), speaker_of_domain)
    chat.run(iter(["/reset", "hello"]))
    assert [turn["content"] for turn in chat.messages] == ["hello", *speaker.answers([alone], 6)]


def test_chat_reads_from_a_pipe(run: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "chat", str(run), "--max-new-tokens", "4"],
        input="hello\n/adapter domain\nhello\n", capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\n(domain answers now)\n" in done.stdout
    assert done.stdout.count("\n") == 3 and ">" not in done.stdout
    assert done.stderr == ""


def test_generate_resumes_after_a_kill_with_identical_output(
    run: Path, speaker: TextGenerator, tmp_path: Path, environment: dict[str, str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"question": f"what is {n} and {'more ' * (n % 5)}?", "n": n} for n in range(80)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    options = ["--in", str(prompts), "--out", str(killed), "--batch-size", "1"]
    start = [sys.executable, "-m", "dtrain", "generate", str(run), *options]
    child = subprocess.Popen([*start, "--max-new-tokens", "24"], env=environment)
    deadline = time.monotonic() + 120
    while not (killed.exists() and killed.stat().st_size) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    answered = killed.read_bytes().count(b"\n")
    assert 0 < answered < len(rows)
    if killed.read_bytes().endswith(b"\n"):
        with open(killed, "ab") as file:
            file.write(json.dumps(rows[answered]).encode()[:20])  # cut off in the prompt
    choice = served_models(str(run))["task"]
    speaker.switch(choice)
    for target, batch in ((killed, 5), (whole, 3)):
        answers = Answers.open(target, prompts, f"{run} task {choice.fingerprint}, up to 24 tokens")
        generate(speaker, prompts, answers, batch, 24)
    assert killed.read_bytes() == whole.read_bytes()
    answered = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [{"question": a["question"], "n": a["n"]} for a in answered] == rows


def test_combined_adapter_is_listed_and_answers(
    run: Path, speaker: TextGenerator, tmp_path: Path
) -> None:
    both = run / "both"
    if not both.exists():
        combine_adapters(run / "domain" / "adapter", run / "task" / "adapter", both)
    try:
        adapters = {adapter.name: adapter for adapter in list_adapters(run)}
        assert list(adapters) == ["domain", "task", "both"]
        assert adapters["both"].base == adapters["domain"].base == stage_base(run)
        assert adapters["task"].base == str(run / "domain" / "merged")
        assert adapters["both"].ranks == [12] and adapters["both"].origin.kind == "combined"
        speaker.switch(served_models(str(run))["both"])
        expected = logits(plain(run / "task" / "merged"))
        assert (speaker.logits(IDS) - expected).abs().max() < TOLERANCE
    finally:
        for path in (*both.iterdir(), both):
            path.rmdir() if path.is_dir() else path.unlink()
