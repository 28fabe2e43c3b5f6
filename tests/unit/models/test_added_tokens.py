"""A base with new tokens: its tokenizer, its rows, and its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3nConfig,
    Gemma4TextConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.timm_wrapper import modeling_timm_wrapper as timm

from dtrain.config.schema import Model
from dtrain.config.tokens import Tokens
from dtrain.core.errors import UserError
from dtrain.models.added_tokens import (
    add_tokens,
    check_lookup,
    open_base,
    open_tokenizer,
    token_ids,
)
from dtrain.models.check_base import check_new, known_tokens
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint

WORDS = ["<unk>", *(f"w{number}" for number in range(9))]
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}

SMALL_TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_kv_shared_layers": 0, "laurel_rank": 8,
    "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip


@pytest.fixture
def extend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """extend(tokens, rows of the base, …) → the base's model, the new model, its folder, ids."""
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))

    def run(
        add: Any, rows: int, config: type = LlamaConfig, shard: str = "1GB", **settings: Any
    ) -> tuple[Any, Any, Path, list[int]]:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config(vocab_size=rows, **SIZES, **settings))
        for parameter in base.parameters():
            torch.nn.init.normal_(parameter)
        base.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size=shard)
        rules = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
        rules.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>")
        tokenizer.save_pretrained(tmp_path / "base")
        model = Model(base=str(tmp_path / "base"), tokens=Tokens(add=add))
        folder = open_base(model)
        ids = token_ids(load_tokenizer(folder), model.tokens)
        assert tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(
            open_tokenizer(model)
        )
        return base, AutoModelForCausalLM.from_pretrained(folder), folder, ids

    return run


def matrices(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@pytest.mark.parametrize("rows", [16, 10, 11], ids=["spare rows", "no spare row", "one spare row"])
def test_rows_are_those_of_transformers_and_new_ones_start_at_the_mean(
    extend: Callable[..., Any], rows: int
) -> None:
    base, model, _, ids = extend(["<tool>", "<end>"], rows)
    assert ids == [10, 11]
    assert model.config.vocab_size == max(rows, 12)
    old = [i for i in range(rows) if i not in ids]
    for before, after in zip(matrices(base), matrices(model), strict=True):
        assert torch.equal(after[old], before[old])
        mean = before[:10].double().mean(0).to(torch.bfloat16)
        assert torch.equal(after[ids], torch.stack([mean, mean]))
    ids_of_text = torch.tensor([[1, 5, 3]])
    with torch.no_grad():
        logits = model(input_ids=ids_of_text).logits[..., old]
        assert torch.equal(logits, base(input_ids=ids_of_text).logits[..., old])


def test_a_token_starts_at_the_mean_of_its_words(extend: Callable[..., Any]) -> None:
    base, model, _, ids = extend({"<tool>": "w3 w5 w5", "<end>": "w0"}, 10)
    for before, after in zip(matrices(base), matrices(model), strict=True):
        mean = before[[4, 6, 6]].double().mean(0).to(torch.bfloat16)
        assert torch.equal(after[ids], torch.stack([mean, before[1]]))


def test_embeddings_of_each_layer_get_rows_too(extend: Callable[..., Any]) -> None:
    base, model, _, ids = extend(
        ["<tool>", "<end>"],
        10,
        config=Gemma4TextConfig,
        vocab_size_per_layer_input=10,
        hidden_size_per_layer_input=4,
        head_dim=4,
        num_key_value_heads=2,
    )
    before, after = (x.model.embed_tokens_per_layer.weight for x in (base, model))
    mean = before.double().mean(0).to(torch.bfloat16)
    assert torch.equal(after, torch.cat([before, mean[None], mean[None]]))
    assert model(input_ids=torch.tensor([[1, *ids]])).logits.shape == (1, 3, 12)


@pytest.mark.parametrize("key", ["pad_token_id", "eos_token_id"])
def test_a_number_that_the_base_names_is_refused(extend: Callable[..., Any], key: str) -> None:
    with pytest.raises(UserError, match=f"'<end>' would get number 11, which is the {key}"):
        extend(["<tool>", "<end>"], 16, **{key: 11})


def test_a_number_that_another_token_has_is_refused() -> None:
    rules = Tokenizer(models.WordLevel({"<unk>": 0, "a": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules)
    with pytest.raises(UserError, match="gives a new token number 2, which another token has"):
        add_tokens(tokenizer, Tokens(add=["<tool>"]))


def test_one_matrix_stays_one(extend: Callable[..., Any]) -> None:
    _, model, folder, _ = extend(["<tool>"], 10, tie_word_embeddings=True)
    first, second = matrices(model)
    assert first is second
    assert len(first) == 11
    assert "lm_head.weight" not in (folder / "model.safetensors").read_bytes()[:4096].decode(
        errors="ignore"
    )


def test_a_bias_of_the_output_layer_gets_a_row(extend: Callable[..., Any]) -> None:
    base, model, _, ids = extend(["<tool>"], 10, config=PhiConfig)
    bias = base.lm_head.bias.detach().double().mean().to(torch.bfloat16)
    assert torch.equal(model.lm_head.bias[ids[0]], bias)


def test_files_without_such_rows_are_links_and_the_folder_is_built_once(
    extend: Callable[..., Any],
) -> None:
    _, _, folder, _ = extend(["<tool>"], 10, shard="1KB")
    files = sorted(folder.glob("*.safetensors"))
    copies = [path for path in files if not path.is_symlink()]
    assert 1 <= len(copies) <= 2 < len(files), "of embeddings and output matrix alone"
    before = folder.stat().st_mtime_ns
    assert open_base(Model(base=str(folder.parents[2] / "base"), tokens=Tokens(add=["<tool>"])))
    assert folder.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (["w3"], "has the token 'w3' already, number 4"),
        ({"<tool>": "w3 zzz w5"}, "'zzz' is unknown to the base's tokenizer"),
    ],
)
def test_what_cannot_be_added_is_refused_and_leaves_nothing(
    extend: Callable[..., Any], tmp_path: Path, add: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        extend(add, 10)
    assert not [p for p in (tmp_path / "cache" / "bases").iterdir() if p.is_dir()]


def test_known_tokens_are_found_without_the_tokenizer(
    extend: Callable[..., Any], tmp_path: Path
) -> None:
    _, _, folder, ids = extend(["<tool>"], 10)
    assert known_tokens(folder)["<tool>"] == ids[0]
    with pytest.raises(UserError, match="has the token 'w8' already, number 9"):
        check_new(["<new>", "w8"], known_tokens(folder))
    for broken in ('{"model": []}', '{"model": {"vocab": 5}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer's file"):
            known_tokens(tmp_path)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ([], "at least 1"),
        ({}, "at least 1"),
        ([""], "at least 1 character"),
        (["<a>", "<b>", "<a>"], "'<a>' is there twice"),
        (["<a> "], "neither begins nor ends with a space"),
        (["a\tb"], "control or invisible"),
        (["a\u200bb"], r"such as '\\u200b'"),
        ({"<a>": ""}, "at least 1 character"),
        ({"<a>": "  "}, "'<a>' has no words to start from"),
        ({"<a>": "the <b>.", "<b>": "x"}, "cannot start from '<b>', which is new too; .*, 'x'"),
    ],
)
def test_tokens_that_nobody_can_mean_are_refused(add: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Tokens(add=add)


def test_words_may_be_those_of_a_new_token_or_contain_it() -> None:
    add = {"cat": "cat", "kitten": "cat", "<a>": "concatenate a cat"}
    assert Tokens(add=add).words == add


def test_a_token_may_start_from_the_unknown_one(extend: Callable[..., Any]) -> None:
    base, model, _, ids = extend({"<tool>": "<unk>"}, 10)
    assert torch.equal(matrices(model)[0][ids[0]], matrices(base)[0][0])


def test_a_tokenizer_that_splits_a_new_token_is_refused() -> None:
    rules = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>")
    tokenizer.add_tokens = lambda tokens: 0  # as one that takes no new tokens
    with pytest.raises(UserError, match=r"does not encode the new token '<tool>' as one token"):
        add_tokens(tokenizer, Tokens(add=["<tool>"]))


@pytest.mark.parametrize(("kind", "why"), [("llama", ""), ("gemma4_text", "fails: index out of")])
def test_tokens_beyond_a_second_table_are_refused(
    save_small: Callable[..., Any], kind: str, why: str
) -> None:
    """Gemma 4 has an embedding of each token for each layer, too."""
    config = save_small(kind, None, vocab_size=516)
    if not why:
        check_lookup(config, Model(base="unused"), [512, 515])
        return
    with pytest.raises(UserError, match=f"'{kind}' does not read token 515 as text.*{why}"):
        check_lookup(config, Model(base="unused"), [512, 515])


def test_tokens_that_stand_for_sounds_are_refused(
    save_small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3n keeps numbers above its text for images and sounds, though a tokenizer has fewer."""

    def without_layers(self: Any, config: Any, *_: Any, **__: Any) -> None:
        super(timm.TimmWrapperModel, self).__init__(config)

    monkeypatch.setattr(timm.TimmWrapperModel, "__init__", without_layers)
    text = SMALL_TEXT | {"vocab_size": 768, "vocab_size_per_layer_input": 512}
    config = Gemma3nConfig(
        text_config=text,
        vision_config={"vocab_offset": 512, "hidden_size": 32},
        audio_config={"vocab_offset": 640, "hidden_size": 32, "conf_num_hidden_layers": 1},
    )
    check_lookup(config, Model(base="unused"), [510, 511])
    with pytest.raises(UserError, match="'gemma3n' does not read token 700 as text"):
        check_lookup(config, Model(base="unused"), [512, 700])
