"""Tokenizers and their fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dtrain.core.errors import UserError
from dtrain.models.tokenizer import load_tokenizer, tokenizer_difference, tokenizer_fingerprint


def tokenizer(words: str = "a b c", template: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(("<unk>", *words.split()))}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    result = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", eos_token="c")
    result.chat_template = template
    return result


def test_fingerprint_survives_saving_and_loading(tmp_path: Path) -> None:
    result = tokenizer(template="{{ messages }}")
    result.save_pretrained(tmp_path / "one")
    loaded = load_tokenizer(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(load_tokenizer(tmp_path / "two"))


def test_fingerprint_depends_on_rules_and_not_on_past_calls() -> None:
    first = tokenizer()
    before = tokenizer_fingerprint(first)
    first("a b c", truncation=True, max_length=2)
    assert tokenizer_fingerprint(first) == before
    assert tokenizer_fingerprint(tokenizer("a c b")) != before
    assert tokenizer_fingerprint(tokenizer(template="{{ messages }}")) != before


def test_missing_tokenizer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


UNTRAINABLE = {"model_type": "bert", "quantization_config": {"quant_method": "gptq"}}


@pytest.mark.parametrize("config", [UNTRAINABLE, {"model_type": "qwen3", "hidden_size": "x"}])
def test_a_missing_tokenizer_is_not_called_a_configs_fault(
    config: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="there is no file of one, such as tokenizer") as error:
        load_tokenizer(tmp_path)
    assert error.value.where == str(tmp_path)


def test_a_broken_tokenizer_is_not_called_a_configs_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(UNTRAINABLE))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_what_two_tokenizers_differ_in_is_named() -> None:
    first = tokenizer()
    assert tokenizer_difference(first, tokenizer(template="{{ messages }}")) == ""
    more = tokenizer("a b c d")
    assert tokenizer_difference(more, first) == "it lacks 'd'"
    assert tokenizer_difference(first, more) == "it has 'd' in addition"
    assert "its 'b' is number 3, not 2" in tokenizer_difference(first, tokenizer("a c b"))
    with_special = tokenizer()
    with_special.add_special_tokens({"additional_special_tokens": ["b"]})
    assert "'b' is a special token" in tokenizer_difference(first, with_special)


@pytest.mark.parametrize("wrong", [{"max_position_embeddings": "32"}, {"num_hidden_layers": None}])
def test_a_broken_config_is_not_called_a_tokenizers_fault(
    wrong: dict[str, object], tmp_path: Path
) -> None:
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # so that the config says which class reads it
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"} | wrong))
    with pytest.raises(UserError, match="expected int, got") as error:
        load_tokenizer(tmp_path)
    assert error.value.where.endswith("config.json") and next(iter(wrong)) in error.value.message
    assert "tokenizer" not in error.value.message
