"""A real byte-level tokenizer, chat templates as published, and small files of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dtrain.config.data import Data
from dtrain.data.assistant_spans import render_answers
from dtrain.data.chat_templates import resolve_template
from dtrain.data.conversations import Conversation, parse_messages
from dtrain.data.packed_dataset import PackedDataset
from dtrain.data.prepare import prepare
from dtrain.objectives.base import objective_class

FAMILIES = Path(__file__).with_name("templates")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>"]
TEXT = "The quick brown fox jumps over the lazy dog. Question answer system user assistant. " * 8

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(template: str | None = CHATML, **more: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 330 tokens: any text goes in and comes out again."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **more}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., PackedDataset]:
    """prepared(kind, [source, …], sequence_length=…) → the mixture, made in tmp_path/cache."""

    def run(kind: Any, sources: list[dict[str, Any]], **settings: Any) -> PackedDataset:
        chosen_tokenizer = settings.pop("tokenizer", tokenizer)
        cache = settings.pop("cache", tmp_path / "cache")
        batch = settings.pop("global_batch", 1)
        data = Data.model_validate({"sources": sources, "sequence_length": 64, **settings})
        return prepare(
            data,
            objective_class(kind).dataset,
            chosen_tokenizer,
            "tokenizer-1",
            cache,
            global_batch=batch,
        )

    return run


@pytest.fixture
def template(make_tokenizer):
    """template(family or jinja text) → the template."""

    def run(name):
        path = FAMILIES / f"{name}.jinja"
        text = path.read_text(encoding="utf-8") if "{" not in name else name
        return resolve_template("auto", make_tokenizer(text, bos_token="<s>", eos_token="</s>"))

    return run


@pytest.fixture
def target_texts(template):
    """target_texts(template, messages as in a row) → (texts of the targets, what is counted)."""

    def run(name, messages, tools=None, train_on="all"):
        counts: Counter[str] = Counter()
        conversation = Conversation(parse_messages(messages, "messages", "f:1"), tools)
        text, spans = render_answers(template(name), conversation, "f:1", train_on, counts)
        return [text[start:stop] for start, stop in spans], +counts

    return run
