"""The tiny model is the same to the bit everywhere: golden losses stand on it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtrain.core.hashes import file_hash
from dtrain.samples import tiny_llama

WEIGHTS_SHA256 = "fad4067bc4c9d21450b106b167fc922b916771a1e29da5f5e414ff0ea5da83f1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama.make(built)
    return built


def test_weights_match_the_known_hash(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS_SHA256


def test_two_builds_are_identical(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # must not matter
    tiny_llama.make(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    for name in names:
        assert file_hash(folder / name) == file_hash(tmp_path / name), name


def test_building_keeps_torchs_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny_llama.make(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_tokenizer_fits_the_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= tiny_llama.VOCABULARY
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3
    text = "Thé fox\n\tsees 12 owls, 日本."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_ends_each_turn_with_eos(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert text.count(tokenizer.eos_token) == 2
