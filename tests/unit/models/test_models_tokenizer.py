"""Tokenizers and their fingerprints."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dtrain.core.errors import UserError
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint


def tokenizer(words: str = "a b c", template: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("<unk>", *words.split()))}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", eos_token="c")
    made.chat_template = template
    return made


def test_fingerprint_survives_saving_and_loading(tmp_path: Path) -> None:
    made = tokenizer(template="{{ messages }}")
    made.save_pretrained(tmp_path / "one")
    loaded = load_tokenizer(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(load_tokenizer(tmp_path / "two"))


def test_fingerprint_sees_what_changes_ids_and_not_what_was_tokenised() -> None:
    first = tokenizer()
    mark = tokenizer_fingerprint(first)
    first("a b c", truncation=True, max_length=2)
    assert tokenizer_fingerprint(first) == mark
    assert tokenizer_fingerprint(tokenizer("a c b")) != mark
    assert tokenizer_fingerprint(tokenizer(template="{{ messages }}")) != mark


def test_missing_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
