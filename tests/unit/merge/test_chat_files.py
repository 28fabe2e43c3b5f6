"""generation_config.json and the chat template of a result, whatever its base has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from dtrain.config.schema import Stage
from dtrain.core.errors import UserError
from dtrain.data.end_of_turn import StopCriterion, check_template
from dtrain.merge.chat_files import (
    adapter_chat_files,
    combined_chat_files,
    generation_config,
    merged_chat_files,
    stored_template,
)
from dtrain.models.tokenizer import load_tokenizer
from dtrain.samples.make import ensure

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"


def write(folder: Path, name: str, content: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def stage(**data: Any) -> Stage:
    sources = {"sequence_length": 64, "sources": [{"path": "rows.jsonl"}], **data}
    train = {"global_batch_size": 1, "steps": 1, "learning_rate": 1e-3}
    return Stage.model_validate(
        {"name": "s", "kind": "sft", "method": {"kind": "full"}, "data": sources, "train": train}
    )


@pytest.mark.parametrize(
    ("base_config", "model", "ends"),
    [
        ({"eos_token_id": 2}, {}, [2, 7]),
        ({"eos_token_id": [4, 2]}, {}, [4, 2, 7]),
        ({"eos_token_id": 7}, {}, 7),
        ({"temperature": 0.5}, {}, 7),
        (None, {"eos_token_id": 5}, [5, 7]),
        (None, {"text_config": {"eos_token_id": [5, 6]}, "eos_token_id": None}, [5, 6, 7]),
        (None, {}, 7),
    ],
)
def test_end_of_turn_is_added_to_the_eos_of_the_base(
    base_config: dict[str, Any] | None, model: dict[str, Any], ends: object, tmp_path: Path
) -> None:
    write(tmp_path, "config.json", {"model_type": "llama", **model})
    if base_config is not None:
        write(tmp_path, GENERATION, {"_from_model_config": True, **base_config})
    written = json.loads(generation_config(tmp_path, [StopCriterion(token=7)]))
    kept = {key: value for key, value in (base_config or {}).items() if key != "eos_token_id"}
    assert written == {**kept, "eos_token_id": ends}
    write(tmp_path / "out", GENERATION, written)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ends


def test_stop_string_is_added_to_existing_ones(tmp_path: Path) -> None:
    write(tmp_path, GENERATION, {"eos_token_id": 2, "stop_strings": ["User:"]})
    written = json.loads(
        generation_config(tmp_path, [StopCriterion(text="###"), StopCriterion(text="User:")])
    )
    assert written == {"eos_token_id": 2, "stop_strings": ["User:", "###"]}


def test_recipe_template_replaces_every_stored_template(tmp_path: Path) -> None:
    base, tokenizer = ensure("tiny-llama"), load_tokenizer(ensure("tiny-llama"))
    assert TEMPLATE not in adapter_chat_files(stage(template="auto"), base, tokenizer)
    files = merged_chat_files(
        base, adapter_chat_files(stage(template="instruction"), base, tokenizer)
    )
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, text in files.items():
        write(tmp_path, name, text)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Why?"}]
    text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert str(text).endswith("### Instruction:\nWhy?\n\n### Response:\n")
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    # A later stage with the base's own template writes that one back.
    later = adapter_chat_files(stage(template="auto"), tmp_path, tokenizer)
    assert later[TEMPLATE] == tokenizer.chat_template


def test_the_template_of_a_processor_is_replaced_too(tmp_path: Path) -> None:
    """Else AutoProcessor and vLLM would take the base's: they prefer that file."""
    write(tmp_path, "chat_template.json", {"chat_template": "old"})
    files = merged_chat_files(tmp_path, {TEMPLATE: "new"})
    assert json.loads(files["chat_template.json"]) == {"chat_template": "new"}
    assert merged_chat_files(tmp_path, {}) == {}


@pytest.mark.parametrize("has_own", [True, False], ids=["two templates", "the processor's alone"])
def test_every_file_gets_the_template_of_the_training(tmp_path: Path, has_own: bool) -> None:
    """The tokenizer's, which a processor may not have; a processor's where there is no other."""
    base = ensure("tiny-llama")
    for path in (*base.glob("*token*"), base / "config.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = str(load_tokenizer(base).chat_template)
    other = own.replace("<|im_start|>", "<|turn|>")
    if has_own:
        write(tmp_path, TEMPLATE, own)
    write(tmp_path, "chat_template.json", {"chat_template": other})
    trained = own if has_own else other
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == trained
    check_template("auto", tmp_path)
    files = merged_chat_files(
        tmp_path, adapter_chat_files(stage(template="auto"), tmp_path, tokenizer)
    )
    assert files[TEMPLATE] == trained
    assert json.loads(files["chat_template.json"]) == {"chat_template": trained}


def test_plain_text_stage_writes_no_chat_files(tmp_path: Path) -> None:
    base = ensure("tiny-llama")
    plain = stage().model_copy(update={"kind": "cpt"})
    assert adapter_chat_files(plain, base, load_tokenizer(base)) == {}


def test_template_of_any_transformers_version_is_found(tmp_path: Path) -> None:
    assert stored_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert stored_template(tmp_path) == "D"
    write(tmp_path, "tokenizer_config.json", {"chat_template": "own"})
    assert stored_template(tmp_path) == "own"
    write(tmp_path, TEMPLATE, "newer")
    assert stored_template(tmp_path) == "newer"


def test_adapters_store_every_stop_string_and_the_last_template(tmp_path: Path) -> None:
    write(tmp_path / "base", GENERATION, {"eos_token_id": 2, "top_p": 0.9})
    for number, name in enumerate(("one", "two", "three")):
        (tmp_path / name).mkdir()
        if name != "three":
            write(tmp_path / name, GENERATION, {"eos_token_id": [2, 7 + number]})
            write(tmp_path / name, TEMPLATE, name)
    folders = [tmp_path / name for name in ("one", "two", "three")]
    files = combined_chat_files(tmp_path / "base", folders)
    assert files[TEMPLATE] == "two"
    assert json.loads(files[GENERATION]) == {"eos_token_id": [2, 7, 8], "top_p": 0.9}
    assert combined_chat_files(tmp_path / "base", folders[2:]) == {}


def test_a_damaged_file_of_the_base_is_found_before_it_is_copied(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[[")
    with pytest.raises(UserError, match=f"^{tmp_path}/generation_config.json: "):
        merged_chat_files(tmp_path, {})
