"""Answers to a file of prompts: batching, resuming, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dtrain.cli import app, chat
from dtrain.config.schema import Model
from dtrain.core.errors import UserError
from dtrain.serving.generate import Answers, count_prompts, generate, read_prompts
from dtrain.serving.generator import TextGenerator
from dtrain.serving.run_models import ServedModel

ROWS = [
    {"prompt": "short"},
    {"question": "a question " + "and more of it " * 20, "answer": "a reference"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                  {"role": "user", "content": "c"}]},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"prompt": "äöü 漢字"},
]  # fmt: skip


@pytest.fixture(scope="module")
def speaker() -> TextGenerator:
    return TextGenerator(ServedModel("dtrain:tiny-llama"), Model(base="tiny"), torch.device("cpu"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")  # empty lines do not count
    return path


def answered(
    speaker: TextGenerator, prompts: Path, out: Path, batch: int, by: str = "tiny"
) -> list:
    generate(speaker, prompts, Answers.open(out, prompts, by), batch, 8)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_batched_answers_equal_single_answers(
    speaker: TextGenerator, prompts: Path, tmp_path: Path
) -> None:
    alone = answered(speaker, prompts, tmp_path / "1.jsonl", 1)
    assert answered(speaker, prompts, tmp_path / "5.jsonl", 5) == alone
    for row, answer in zip(ROWS, alone, strict=True):
        assert answer == {**row, "generated": answer["generated"], "generated_by": "tiny"}
    assert len({answer["generated"] for answer in alone}) > 2


def test_prompt_tokens_equal_those_of_training(speaker: TextGenerator, prompts: Path) -> None:
    talks = [prompt.messages for prompt in read_prompts(prompts)]  # type: ignore[union-attr]
    texts = [speaker.prompt(talk) for talk in talks]
    assert texts[0] == "<|im_start|>user\nshort<|im_end|>\n<|im_start|>assistant\n"
    assert texts[2].count("<|im_start|>") == 4 and texts[2].endswith("<|im_start|>assistant\n")
    assert "add\n\n1 2<|im_end|>" in texts[3]
    speaker.switch(ServedModel("dtrain:tiny-llama", template="instruction"))
    assert "### Input:\n1 2\n\n### Response:\n" in speaker.prompt(talks[3])
    speaker.switch(ServedModel("dtrain:tiny-llama"))


def test_generate_resumes_after_existing_answers(
    speaker: TextGenerator, prompts: Path, tmp_path: Path
) -> None:
    whole = answered(speaker, prompts, tmp_path / "whole.jsonl", 2)
    out = tmp_path / "out.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    marked = lines[0].replace(b'"generated": "', b'"generated": "kept ')
    out.write_bytes(marked + lines[1] + lines[2][:-7])
    again = answered(speaker, prompts, out, 2)
    assert again[0]["generated"] == "kept " + whole[0]["generated"] and again[1:] == whole[1:]


def test_answers_of_another_model_or_prompts_are_not_resumed(
    speaker: TextGenerator, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    answered(speaker, prompts, out, 5)
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"out\.jsonl:1: answers another prompt, or was not"):
        Answers.open(out, prompts, "another")
    prompts.write_text(prompts.read_text().replace("a reference", "changed"))
    with pytest.raises(UserError, match=r"out\.jsonl:2: answers another prompt"):
        Answers.open(out, prompts, "tiny")
    out.write_text("notes of mine\n")
    with pytest.raises(UserError, match=r"out\.jsonl:1: "):
        Answers.open(out, prompts, "tiny")
    assert out.read_text() == "notes of mine\n" and before


@pytest.mark.parametrize(
    "text", ['{"prompt": "mine"}', '{"prompt": "short", "notes": 1}', "[1, 2]"]
)
def test_output_file_without_answers_is_untouched(prompts: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match="answers another prompt"):
        Answers.open(tmp_path / "mine.json", prompts, "tiny")
    assert (tmp_path / "mine.json").read_text() == text


def test_answers_with_another_length_limit_are_not_resumed(prompts: Path, tmp_path: Path) -> None:
    def dtrain(tokens: int) -> Result:
        options = ["--in", str(prompts), "--out", str(tmp_path / "out.jsonl")]
        options += ["--max-new-tokens", str(tokens)]
        return CliRunner().invoke(app, ["generate", "dtrain:tiny-llama", *options])

    assert dtrain(3).exit_code == 0
    rows = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(rows[:2]), encoding="utf-8")
    error = dtrain(5).exception
    assert isinstance(error, UserError) and "was not answered by" in str(error)
    assert dtrain(3).exit_code == 0
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "".join(rows)


def test_two_processes_do_not_write_one_file(prompts: Path, tmp_path: Path) -> None:
    first = Answers.open(tmp_path / "out.jsonl", prompts, "tiny")
    with pytest.raises(UserError, match="another process is writing it"):
        Answers.open(tmp_path / "out.jsonl", prompts, "tiny")
    first.file.close()


def test_broken_lines_are_reported_with_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = ['{"prompt": "a"}', "{", "", "[1]", '{"text": "a"}', '{"prompt": 3}',
             '{"messages": [{"role": "user"}]}', '{"prompt": "a", "generated": "b"}',
             '{"prompt": "a", "n": "\\ud83d"}']  # fmt: skip
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        count_prompts(path)
    message = str(caught.value)
    for number, problem in ((2, "is not JSON"), (4, "is not a JSON object"),
                            (5, "contains no prompt"), (6, "contains no prompt"),
                            (7, "has no `content`"), (8, "has a `generated` already"),
                            (9, "contains an unpaired surrogate")):  # fmt: skip
        assert f"{path}:{number}: " in message and problem in message
    assert f"{path}:1: " not in message
    path.write_text("\n")
    with pytest.raises(UserError, match="contains no prompts"):
        count_prompts(path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="cannot be read"):
        count_prompts(path)


def test_a_stop_string_ends_an_answer(tmp_path: Path) -> None:
    """The template closes a turn with ordinary tokens; the prompt is the same for both."""
    rows = "{%- for m in messages -%}{{ '<|im_start|>' + m.content }}{% endfor %}"
    template, prompts = tmp_path / "chat.jinja", [[{"role": "user", "content": "Why is it red?"}]]

    def answer(closing: str) -> str:
        end = (
            "{% if m.role == 'assistant' %}{{ '"
            + closing
            + "' }}{% endif %}{{ '\\n' }}{% endfor %}"
        )
        template.write_text(rows.replace("{% endfor %}", end))
        choice = ServedModel("dtrain:tiny-llama", template=str(template))
        speaker = TextGenerator(choice, Model(base="tiny"), torch.device("cpu"))
        return speaker.answers([speaker.prompt(prompt) for prompt in prompts], 30)[0]

    free = answer("")
    middle = next(free[n : n + 3] for n in range(4, len(free)) if free[n : n + 3].isascii()
                  and free[n : n + 3].isalpha())  # fmt: skip
    assert answer(middle) == free.partition(middle)[0].strip() != free


def test_a_base_that_cannot_be_loaded_leaves_no_file_of_answers(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("cannot be loaded")

    monkeypatch.setattr(chat, "_speaker", fail)
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="cannot be loaded"):
        chat.generate("dtrain:tiny-llama", prompts, out)
    assert not out.exists()
    out.write_text('{"prompt": "of another file"}\n')
    with pytest.raises(UserError, match="answers another prompt"):  # before a load of minutes
        chat.generate("dtrain:tiny-llama", prompts, out)
