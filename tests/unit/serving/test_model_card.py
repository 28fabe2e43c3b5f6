"""Model cards: what they say, what they must not say, and that nobody depends on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from dtrain.config.load import load_recipe
from dtrain.core.files import read_sealed
from dtrain.merge.verify import verify_model
from dtrain.models.meta_model import build_meta_model
from dtrain.models.quantize import names_to_skip, nf4_layers
from dtrain.monitoring.run_record import RunRecord
from dtrain.samples.make import ensure
from dtrain.serving.card_training import held_out_table
from dtrain.serving.card_usage import PLACEHOLDER, model_usage, nf4_code, only_merged
from dtrain.serving.model_card import adapter_card, base_model, md, merged_card, write_stage_cards
from dtrain.serving.run_models import ServedRun

LAYERS = {"model.layers.0.self_attn.q_proj": (8, 8)}
HOSTILE = "x`|[a](b)<script>\n---\n# *h*"


def test_cards_beside_the_results_of_a_run_are_outside_of_its_hashes(run: Path) -> None:
    adapter, merged = run / "task" / "adapter", run / "task" / "merged"
    header = ModelCard.load(adapter / "README.md").data
    assert header.library_name == "peft" and {"sft", "lora"} <= set(header.tags)
    text = (merged / "README.md").read_text()
    assert ModelCard(text).data.library_name == "transformers"
    assert "| domain | dtrain:tiny-text/domain.jsonl | text | — | 240 |" in text
    assert str(run) not in text and "/root" not in text
    (merged / "README.md").write_text("my own card\n")
    assert not verify_model(merged).problems
    assert "adapter/README.md" not in read_sealed(run / "task" / "stage.json")["files"]
    recipe = load_recipe(str(run / "recipe.yaml"))
    write_stage_cards(ServedRun(run, recipe), recipe.stages[1])
    assert (merged / "README.md").read_text() == "my own card\n"
    (merged / "README.md").unlink()  # a run of an older dtrain gets one
    write_stage_cards(ServedRun(run, recipe), recipe.stages[1])
    assert (merged / "README.md").read_text() == text


@pytest.mark.parametrize("kind", ["llama", "mamba", "gemma3n_text"])
def test_code_for_an_adapter_quantizes_the_layers_that_training_did(
    tmp_path: Path, save_small: Callable, kind: str
) -> None:
    """transformers would pack Mamba's dt_proj, whose weight its code reads."""
    save_small(kind, tmp_path)
    code = nf4_code(tmp_path, trusts_code=False)
    assert ("skip_modules" in code) == (kind != "llama")
    settings = eval(f"dict({code})", {"BitsAndBytesConfig": BitsAndBytesConfig})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings, device_map={"": "cpu"})
    packed = {n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert packed == nf4_layers(build_meta_model(model.config))
    model(torch.arange(4, 24)[None], use_cache=False)


def test_routers_and_experts_in_nf4_are_not_loaded_otherwise(
    tmp_path: Path, save_small: Callable
) -> None:
    """transformers would pack the routers, and leave the experts in 16 bits."""
    mixture = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    config = save_small("gemma4", None, text=mixture | {"moe_intermediate_size": 32})
    assert "router.proj" in names_to_skip(config, trust_remote_code=False)
    config.save_pretrained(tmp_path)
    assert "over experts in NF4" in only_merged(tmp_path, trusts_code=False)
    save_small("llama", tmp_path)
    assert only_merged(tmp_path, trusts_code=False) == ""


@pytest.mark.parametrize("chats", [False, True])
def test_code_for_a_multimodal_model_runs(
    tmp_path: Path, save_small: Callable, chats: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pipeline of texts does not load it."""
    save_small("mistral3", tmp_path)
    AutoTokenizer.from_pretrained(ensure("tiny-llama")).save_pretrained(tmp_path)
    stages = load_recipe("tiny").stages if chats else []
    code = model_usage(tmp_path, stages, trusts_code=False).code
    exec(code.replace(PLACEHOLDER, str(tmp_path)).replace("256", "2"), {})
    assert capsys.readouterr().out.strip()


def test_card_names_the_new_tokens_and_the_base_that_they_were_added_to(
    tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    base = tmp_path / "cache" / "bases" / "0123"
    overrides = ["model.base=/models/llama", "model.tokens.add=[<tool>]"]
    run = ServedRun(tmp_path / "run", load_recipe("tiny", overrides))
    make_adapter(run.adapter(run.recipe.stages[0]), LAYERS, 2, base_model_name_or_path=str(base))
    lineage = {"base": {"path": str(base)}}
    (run.folder / "lineage.json").write_text(json.dumps(lineage))
    assert run.base == str(base), "not the base without the tokens, if the cache was emptied"
    card = adapter_card(run, run.recipe.stages[0])
    assert r"for llama. New tokens: \<tool\>." in card
    assert 'AutoTokenizer.from_pretrained("THIS_MODEL")' in card
    assert card.index("resize_token_embeddings") < card.index("PeftModel.from_pretrained")
    assert "0123" not in card


@pytest.fixture
def hostile(tmp_path: Path) -> ServedRun:
    """A run whose names and paths try to leave their place in the card."""
    base = tmp_path / "home" / "alice" / "llama"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: llama3\nlicense_link: LICENSE\n---\n# Llama\n")
    settings = {
        "name": HOSTILE,
        "model": {"base": str(base)},
        "stages.task.data.sources": [
            {"path": "/home/alice/secret/rows.jsonl", "format": "alpaca"},
            {"path": HOSTILE, "format": "alpaca"},
        ],
        "stages.task.data.template": "/home/alice/chat.jinja",
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    run = ServedRun(tmp_path / "run", load_recipe("tiny", overrides))
    (run.folder / "task" / "merged").mkdir(parents=True)
    return run


def test_card_escapes_names_and_hides_folders(hostile: ServedRun) -> None:
    card = merged_card(hostile, hostile.recipe.stages[1], hostile.folder / "task" / "merged")
    header = ModelCard(card)
    assert header.data.license == "llama3" and header.data.base_model is None
    assert "<script>" not in card and "[a](b)" not in header.text
    assert "alice" not in card and "rows.jsonl" in card
    assert card.count("\n---\n") == 1  # the header's end
    headings = [line for line in header.text.splitlines() if line.startswith("# ")]
    assert headings == [f"# {md(HOSTILE)}"]


@pytest.mark.parametrize(
    "text", ["", "no header", "---\n[1, 2]\n---\n", "---\na: [\n---\n", "\xff"]
)
def test_base_with_an_odd_card_has_no_known_license(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    about = base_model("owner/name", tmp_path)
    assert about.hub == "owner/name" and not about.license


def test_license_link_and_file_of_the_base(hostile: ServedRun) -> None:
    base = Path(hostile.base)
    merged = hostile.folder / "task" / "merged"
    assert base_model("owner/llama", base).license["license_link"].startswith("https://")
    (base / "README.md").unlink()
    (merged / "LICENSE.txt").write_text("terms")
    header = ModelCard(merged_card(hostile, hostile.recipe.stages[1], merged)).data
    assert (header.license, header.license_link) == ("other", "LICENSE.txt")


def test_held_out_table_has_the_change_with_its_standard_error(tmp_path: Path) -> None:
    stages = load_recipe("tiny").stages
    blocks = {"items": [10.0] * 4, "base": [60.0, 62, 61, 63], "task": [40.0, 41, 43, 40]}
    evaluation = {
        "models": ["base", "domain", "task"],
        "losses": {"qa": {"base": 6.15, "domain": 5.0, "task": 4.1}},
        "blocks": {"qa": blocks},
    }
    head, row = held_out_table(RunRecord(tmp_path, evaluation=evaluation), stages)
    assert head == ["", "base", "domain", "task", "change"]
    assert row[:4] == ["qa loss", "6.150", "5.000", "4.100"] and row[4].startswith("-2.050 ± 0.")
    assert not held_out_table(RunRecord(tmp_path), stages)
