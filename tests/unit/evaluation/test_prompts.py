"""Prompts and references of files in every format, and answers that no batch changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dtrain.config.generation import GenerationSet
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.evaluation.prompts import prepare_prompts, read_prompts
from dtrain.models.generation import Decoding, generate_texts
from dtrain.models.hub import base_folder
from dtrain.models.tokenizer import load_tokenizer
from dtrain.pipeline.data_inspection import held_out_of
from dtrain.samples.make import ensure

USER, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}


def read(tmp_path: Path, rows: list[Any], **settings: Any) -> list[tuple[str, str | None]]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = GenerationSet(path=str(path), **settings)
    return [
        (row.prompt_text, row.shown_reference)
        for row in read_prompts(chosen, "evaluation.generation.a")
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ask", "reference": "reply"},
        {"prompt": "ask", "completion": "reply"},
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]},
        {"instruction": "ask", "output": "reply"},
        {"prompt": "ask", "chosen": "reply", "rejected": "no"},
    ],
)
def test_last_answer_of_every_format_is_the_reference(row, tmp_path) -> None:
    assert read(tmp_path, [row]) == [("ask", "reply")]


def test_references_may_be_missing_and_columns_renamed(tmp_path) -> None:
    assert read(tmp_path, [{"prompt": "ask"}, {"prompt": "b"}], limit=1) == [("ask", None)]
    assert read(tmp_path, [{"messages": [USER]}]) == [("ask", None)]
    columns: Any = {"prompt": "q", "completion": "a"}
    assert read(tmp_path, [{"q": "ask", "a": "reply"}], columns=columns) == [("ask", "reply")]
    turns = [USER, ANSWER, {"role": "user", "content": "more"}, {**ANSWER, "content": "end"}]
    expected = ("user: ask\n\nassistant: reply\n\nuser: more", "end")
    assert read(tmp_path, [{"messages": turns}]) == [expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has no prompt"),
        ({"messages": [ANSWER]}, "no turn before the answer"),
        ({"prompt": 3}, "`prompt`"),
        ("text", "must be an object"),
    ],
)
def test_rows_that_are_no_prompts_are_refused_with_their_line(row, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, [row])
    assert "evaluation.generation.a" in error.value.where and "a.jsonl:1" in error.value.where


def test_file_without_rows_and_metric_without_reference_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="the file has no rows"):
        read(tmp_path, [])
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "reference": "b"}\n{"prompt": "ask"}\n')
    key = f"evaluation.generation={{s: {{path: {tmp_path}/b.jsonl, metrics: [f1]}}}}"
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    with pytest.raises(UserError, match="no reference answer, which f1 compares with") as error:
        prepare_prompts(load_recipe("tiny", [key]), tokenizer)
    assert "b.jsonl:2" in error.value.where


def test_what_decides_scores_is_in_the_fingerprint(tmp_path) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    (tmp_path / "s.json").write_text('{"type": "object"}')
    tokenizer = load_tokenizer(ensure("tiny-llama"))

    def identity(more: str = "") -> str:
        key = f"path: {tmp_path}/b.jsonl, metrics: [json_valid], json_schema: {tmp_path}/s.json"
        recipe = load_recipe("tiny", [f"evaluation.generation={{s: {{{key}{more}}}}}"])
        return prepare_prompts(recipe, tokenizer)["s"].fingerprint

    first = identity()
    assert identity(", batch_size: 2") == first != identity(", max_new_tokens: 5")
    (tmp_path / "s.json").write_text('{"type": "array"}')
    assert identity() != first


def test_prompts_are_held_out_of_the_training_data() -> None:
    ensure("tiny-text")
    index = held_out_of(load_recipe("tiny"))
    assert index is not None
    keys = [where.partition(": ")[0] for where in dict.fromkeys(index.locations)]
    assert keys.count("evaluation.generation.answers") == 3


def test_sampled_answers_depend_on_seed_and_row_alone() -> None:
    folder = base_folder("dtrain:tiny-llama")
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    prompts = ["A hen", "The fox sleeps and", "A", "Which color is hen 1?"]

    def answers(rows: list[int], seed: int = 0, top_p: float = 1.0) -> list[str]:
        decoding = Decoding(12, temperature=2.0, top_p=top_p, seed=seed)
        return generate_texts(model, tokenizer, [prompts[r] for r in rows], decoding, rows)

    together = answers([0, 1, 2, 3])
    assert answers([2, 1]) + answers([3]) == [together[2], together[1], together[3]]
    assert answers([0, 1, 2, 3], seed=1) != together
    greedy = generate_texts(model, tokenizer, prompts, Decoding(12))
    assert answers([0, 1, 2, 3], top_p=1e-9) == greedy != together
    tokenizer.pad_token = tokenizer.eos_token = None  # files that name no special tokens
    assert generate_texts(model, tokenizer, prompts, Decoding(12)) == greedy
