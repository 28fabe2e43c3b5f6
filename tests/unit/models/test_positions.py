"""Position limits are measured on the model code; longer documents stop a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from dtrain.cli.recipes import check
from dtrain.config.load import load_recipe
from dtrain.core.cache_paths import sample_folder
from dtrain.core.errors import UserError
from dtrain.models.positions import position_limit
from dtrain.pipeline.stage_inputs import prepare_inputs
from dtrain.planning.known_models import position_warnings, trained_positions
from dtrain.samples.make import ensure

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 512}
FIXED = {
    "gpt2": {"n_positions": 24},  # learned
    "opt": {"max_position_embeddings": 24, "word_embed_proj_dim": 32, "ffn_dim": 64},  # from 2 on
    "gpt_neo": {"max_position_embeddings": 24, "attention_types": [[["global"], 2]]},
    "biogpt": {"max_position_embeddings": 24},
    "gptj": {"n_positions": 24, "rotary_dim": 8},  # a table of sines in each layer
    "mpt": {"max_seq_len": 24},  # a bias of fixed length, and no position ids
}
ENDLESS = {
    "llama": {"max_position_embeddings": 24, "intermediate_size": 64},
    "bloom": {},  # slopes, of any length
}


@pytest.mark.parametrize("kind", FIXED)
def test_position_limit_is_where_the_model_fails(kind: str) -> None:
    config = CONFIG_MAPPING[kind](**{**SMALL, **FIXED[kind]})
    assert position_limit(config, 24) is None
    assert position_limit(config, 25) == position_limit(config, 100) == 24


@pytest.mark.parametrize("kind", ENDLESS)
def test_computed_positions_have_no_limit(kind: str) -> None:
    config = CONFIG_MAPPING[kind](**{**SMALL, **ENDLESS[kind]})
    assert position_limit(config, 1000) is None


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2}}, 8192),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "llama3", "factor": 8.0,
                        "original_max_position_embeddings": 8192,
                    },
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            131072,
        ),
    ],
)  # fmt: skip
def test_position_limit_by_config(config: dict, positions: int | None) -> None:
    assert trained_positions(config) == positions


@pytest.fixture
def recipe(tmp_path: Path):
    """recipe(model type, words of a text, …) → a recipe of one stage with 20 such texts."""
    ensure("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(sample_folder("tiny-llama"))

    def make(kind: str, words: int, *overrides: str):
        config = CONFIG_MAPPING[kind](**{**SMALL, **FIXED.get(kind, ENDLESS.get(kind, {}))})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        for name in ("rows", "held"):
            (tmp_path / f"{name}.jsonl").write_text(('{"text": "%s"}\n' % ("a" * words)) * 20)
        (tmp_path / "q.jsonl").write_text('{"prompt": "a?", "reference": "b"}\n')
        values = {
            "name": "t",
            "model": {"base": str(tmp_path / "base"), "dtype": "float32"},
            "stages": [{
                "name": "domain", "kind": "cpt", "method": {"kind": "lora"},
                "data": {"sequence_length": 64, "sources": [{"path": f"{tmp_path}/rows.jsonl"}]},
                "train": {"global_batch_size": 1, "steps": 1},
            }],
            "output": {"folder": str(tmp_path / "run")},
        }  # fmt: skip
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        return load_recipe(str(tmp_path / "r.yaml"), overrides)

    return make


def test_document_beyond_learned_positions_is_refused_before_the_start(recipe) -> None:
    with pytest.raises(UserError) as error:
        prepare_inputs(recipe("gpt2", 200))
    assert error.value.where == "stages.domain.data"
    assert "sequence_length 64" in error.value.message
    assert "the model has 24 positions" in error.value.message
    assert error.value.fix == "sequence_length: 24 or less"


def test_short_documents_in_a_long_sequence_are_accepted(recipe) -> None:
    inputs = prepare_inputs(recipe("gpt2", 4))
    data = inputs.stages["domain"]
    assert data.longest_segment <= 24 < int(data.tokens(data.sequence_ids_at(0, 1, 0))[0])


def test_evaluation_documents_and_answers_count_too(recipe, tmp_path) -> None:
    held = f"{{kind: cpt, sequence_length: 64, sources: [{{path: {tmp_path}/rows.jsonl}}]}}"
    sets = f"evaluation.sets={{mine: {held}}}"
    short = "stages.domain.data.sequence_length=16"
    with pytest.raises(UserError, match="24 positions") as error:
        prepare_inputs(recipe("gpt2", 200, short, sets))
    assert error.value.where == "evaluation.sets.mine"
    asked = f"evaluation.generation={{q: {{path: {tmp_path}/q.jsonl, max_new_tokens: 20}}}}"
    with pytest.raises(UserError, match="an answer of max_new_tokens 20") as error:
        prepare_inputs(recipe("gpt2", 200, short, asked))
    assert error.value.where == "evaluation.generation.q"


def test_document_beyond_unscaled_rope_is_a_warning(recipe, capsys) -> None:
    prepare_inputs(recipe("llama", 200))
    output = capsys.readouterr().out
    assert "warning: stages.domain.data" in output and "trained for 24 positions" in output
    prepare_inputs(recipe("llama", 4))
    assert "positions" not in capsys.readouterr().out


def test_long_sequences_are_reported_without_torch(recipe, tmp_path, capsys) -> None:
    (line,) = position_warnings(recipe("gpt2", 4))
    capsys.readouterr()
    check(str(tmp_path / "r.yaml"))
    assert f"warning: {line}\n" in capsys.readouterr().err
    assert line.startswith(
        "stages.domain.data: sequence_length is 64, but the model has 24 positions"
    )
    assert position_warnings(recipe("gpt2", 4, "stages.domain.data.sequence_length=24")) == []
    assert position_warnings(recipe("gpt2", 4, "model.base=/nowhere")) == []
