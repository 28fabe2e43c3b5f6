"""`dtrain merge`, `verify` and `diff` as a user meets them."""

from __future__ import annotations

import shutil
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from typer.testing import CliRunner

from dtrain.checkpoints import ParameterShard, Saver
from dtrain.cli import app
from dtrain.config.load import dump, load_recipe
from dtrain.core.errors import UserError
from dtrain.core.files import read_json, write_json, write_sealed
from dtrain.core.hashes import fingerprint
from dtrain.core.weight_files import weight_files
from dtrain.merge.provenance import model_fingerprint
from dtrain.rank_main import resolve
from tests.micro_batches import fill_lora_b

RANKS = 3


def dtrain(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, UserError):
        raise done.exception
    assert done.exit_code in (0, 2), done.exception
    return " ".join(done.output.split())


def state(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in weight_files(folder) for n, t in load_file(path).items()}


def equal(folder: Path, reference: dict[str, Tensor]) -> bool:
    actual = state(folder)
    return all(torch.equal(actual[name], reference[name].to(actual[name].dtype)) for name in actual)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="70KB")
    return tmp_path / "base"


def adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]),
    )
    torch.manual_seed(seed)
    fill_lora_b(adapted, std=0.05)
    adapted.save_pretrained(folder)
    return folder


def trained_by(
    folder: Path, base: Path, kind: str = "lora", dtype: str = "float32"
) -> dict[str, Any]:
    """Write the stage record of an adapter, with the dtype that its checkpoints state."""
    method = {"kind": kind} if kind == "full" else {"kind": kind, "r": 4, "alpha": 8.0}
    inputs = {"parent": model_fingerprint(base), "dtype": dtype, "method": method}
    folder.mkdir(parents=True, exist_ok=True)
    record = {"identity": fingerprint(inputs), "inputs": inputs, "complete": True}
    write_sealed(folder / "stage.json", record | {"facts": {"dtype": "float32"}})
    return inputs


def checkpoint(
    run: Path, base: Path, tensors: dict[str, Tensor], kind: str, dtype: str = "float32"
) -> Path:
    """A checkpoint of the first stage, cut anyhow between three ranks, trained in bfloat16."""
    inputs = trained_by(run / "domain", base, kind, dtype)
    (run / "recipe.yaml").write_text(dump(load_recipe("tiny", [f"model.base={base}"])))
    folder = run / "domain" / "checkpoints"
    savers = [Saver(folder, rank=r, ranks=RANKS, attempt="a") for r in range(RANKS)]
    for rank, saver in enumerate(savers):
        shards = []
        for name, tensor in tensors.items():
            total = prod(tensor.shape)
            start, stop = total * rank // RANKS, total * (rank + 1) // RANKS
            values = tensor.detach().flatten()[start:stop].float()
            shards.append(
                ParameterShard(name, tuple(tensor.shape), start, stop, {"weight": values})
            )
        saver.save(7, shards, {"inputs": inputs, "dtype": "bfloat16"})
    for saver in savers:
        saver.wait()
    return folder / "step-000007"


def by_peft(base: Path, *adapters: Path) -> dict[str, Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for folder in adapters:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return dict(model.state_dict())


def test_merge_of_one_and_two_adapters(base: Path, tmp_path: Path) -> None:
    first, second = adapter(base, tmp_path / "one"), adapter(base, tmp_path / "two", 2)
    assert str(tmp_path / "a") in dtrain("merge", base, first, tmp_path / "a")
    assert equal(tmp_path / "a", by_peft(base, first))
    dtrain("merge", base, first, second, tmp_path / "b", "--processes", 2)
    assert equal(tmp_path / "b", by_peft(base, first, second))
    dtrain("merge", base, first, second, tmp_path / "c", "--weights", "0,1")
    assert equal(tmp_path / "c", by_peft(base, second))
    dtrain("merge", base, first, second, tmp_path / "d", "--combine", "dare_ties", "--seed", 5)
    assert read_json(tmp_path / "d" / "merge.json")["adapters"][0]["combine"] == [
        "dare_ties", 0.5, 5
    ]  # fmt: skip
    assert "0 x one" in (tmp_path / "c" / "README.md").read_text()
    assert "combined by dare\\_ties" in (tmp_path / "d" / "README.md").read_text()


def test_merged_model_generates_the_answers_of_the_adapter(base: Path, tmp_path: Path) -> None:
    adapter_folder = adapter(base, tmp_path / "one")
    dtrain("merge", base, adapter_folder, tmp_path / "out")
    ids = torch.arange(12)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter_folder)
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    answers = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (merged, adapted)]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give BASE ADAPTER"),
        (["--weights", "1,2"], "2 weights for 1 adapters"),
        (["--weights", "half"], "not numbers: half"),
        (["--weights", "nan"], "not numbers: nan"),
        (["--combine", "dare_linear"], "draws at random"),
    ],
)
def test_invalid_arguments_are_refused(
    arguments: list[str], said: str, base: Path, tmp_path: Path
) -> None:
    inputs = [base] if not arguments else [base, adapter(base, tmp_path / "one")]
    with pytest.raises(UserError, match=said):
        dtrain("merge", *inputs, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_stage_record_selects_and_checks_the_base(base: Path, tmp_path: Path) -> None:
    """Its form of the base, and whether this is the base."""
    adapter_folder = adapter(base, tmp_path / "stage" / "adapter")
    trained_by(tmp_path / "stage", base, "qlora")
    for out_name, options in (("a", []), ("b", ["--qlora-base", "dequantized"])):
        dtrain("merge", base, adapter_folder, tmp_path / out_name, *options)
    dtrain("merge", base, adapter_folder, tmp_path / "c", "--qlora-base", "original")
    unpacked, again, plain = (state(tmp_path / out_name) for out_name in "abc")
    assert all(torch.equal(unpacked[name], again[name]) for name in again)
    assert equal(tmp_path / "c", by_peft(base, adapter_folder))
    name = "model.layers.0.self_attn.k_proj.weight"  # without an adapter
    assert torch.equal(plain[name], state(base)[name]) and not torch.equal(
        unpacked[name], plain[name]
    )
    other_base = tmp_path / "a"  # same shapes, other numbers
    with pytest.raises(UserError, match="is not the base that the adapter was trained on"):
        dtrain("merge", other_base, adapter_folder, tmp_path / "d", "--qlora-base", "original")
    assert not (tmp_path / "d").exists() and not (tmp_path / ".d.making").exists()


def test_a_chain_out_of_order_is_refused(base: Path, tmp_path: Path) -> None:
    first, second = (adapter(base, tmp_path / name / "adapter") for name in ("one", "two"))
    inputs = trained_by(tmp_path / "one", base)
    later = inputs | {"parent": fingerprint(inputs)}
    record = {"identity": fingerprint(later), "inputs": later, "complete": True}
    write_sealed(tmp_path / "two" / "stage.json", record)
    dtrain("merge", base, first, second, tmp_path / "a")
    assert equal(tmp_path / "a", by_peft(base, first, second))
    with pytest.raises(UserError, match="none of the adapters before it"):
        dtrain("merge", base, second, first, tmp_path / "b")


def test_full_checkpoint_of_three_ranks_is_merged(base: Path, tmp_path: Path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    tensors = {n: p.detach() + torch.randn_like(p) for n, p in model.named_parameters()}
    saved = checkpoint(tmp_path / "run", base, tensors, "full")
    dtrain("merge", saved, tmp_path / "out")
    assert equal(tmp_path / "out", tensors) and state(tmp_path / "out").keys() == tensors.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_stored_tied_output_matrix_is_merged_with_the_embedding(base: Path, tmp_path: Path) -> None:
    stored = state(base)
    for path in [*weight_files(base), base / "model.safetensors.index.json"]:
        path.unlink()
    embedding = "model.embed_tokens.weight"
    stored["lm_head.weight"] = stored[embedding].clone()
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    trained = torch.randn_like(stored[embedding])
    step = checkpoint(tmp_path / "run", base, {embedding: trained}, "full")
    with pytest.raises(UserError, match="--weights and --combine do not apply"):
        dtrain("merge", step, tmp_path / "out", "--weights", "0.5")
    dtrain("merge", step, tmp_path / "out")
    merged = state(tmp_path / "out")
    assert torch.equal(merged[embedding], trained) and torch.equal(
        merged["lm_head.weight"], trained
    )


def test_adapters_trained_on_different_base_dtypes_are_refused(base: Path, tmp_path: Path) -> None:
    for name, kind in (("a", "lora"), ("b", "qlora")):
        trained_by(tmp_path / name, base, kind)
        adapter(base, tmp_path / name / "adapter")
    folders = [tmp_path / name / "adapter" for name in "ab"]
    for more in ([], ["--combine", "linear"]):
        with pytest.raises(UserError, match="no base is right for all"):
            dtrain("merge", *more, base, *folders, tmp_path / "out")


def test_adapters_of_one_quantized_base_quantize_it_once(base: Path, tmp_path: Path) -> None:
    for name in "ab":
        trained_by(tmp_path / name, base, "qlora")
    first, second = (adapter(base, tmp_path / n / "adapter", s) for s, n in enumerate("ab", 1))
    dtrain("merge", base, first, second, tmp_path / "both")
    dtrain("merge", base, first, tmp_path / "one")
    bare = shutil.copytree(second, tmp_path / "of no record")
    dtrain("merge", tmp_path / "one", bare, tmp_path / "in turn", "--qlora-base", "original")
    assert equal(tmp_path / "both", state(tmp_path / "in turn"))


def test_combined_adapter_is_merged_into_the_base_it_was_trained_on(
    base: Path, tmp_path: Path
) -> None:
    alone = adapter(base, tmp_path / "alone")
    both = shutil.copytree(alone, tmp_path / "both")
    origin = {"identity": "i", "parent": model_fingerprint(base), "base_in_nf4": True}
    write_json(both / "combine.json", {"origin": {**origin, "kind": "combined"}})
    dtrain("merge", base, both, tmp_path / "found")
    dtrain("merge", base, alone, tmp_path / "wanted", "--qlora-base", "dequantized")
    assert equal(tmp_path / "found", state(tmp_path / "wanted"))


def as_saved(adapter: Path) -> dict[str, Tensor]:
    """An adapter's tensors by the names that they have in a checkpoint."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {key.replace(".weight", ".default.weight"): tensors[key] for key in tensors}


def test_adapter_checkpoint_is_merged(base: Path, tmp_path: Path) -> None:
    adapter_folder = adapter(base, tmp_path / "one")
    saved = checkpoint(tmp_path / "run", base, as_saved(adapter_folder), "lora")
    dtrain("merge", saved, tmp_path / "out")
    assert equal(tmp_path / "out", by_peft(base, adapter_folder))


def test_checkpoint_of_dtype_auto_is_merged_in_its_training_dtype(
    base: Path, tmp_path: Path
) -> None:
    """A base packed in bfloat16, on a GPU, where this machine's `auto` is float32."""
    adapter_folder = adapter(base, tmp_path / "stage" / "adapter")
    saved = checkpoint(tmp_path / "run", base, as_saved(adapter_folder), "qlora", "auto")
    dtrain("merge", saved, tmp_path / "out")
    for dtype in ("bfloat16", "float32"):
        inputs = trained_by(tmp_path / "stage", base, "qlora", dtype)
        record = {"identity": fingerprint(inputs), "inputs": inputs, "facts": {"dtype": dtype}}
        write_sealed(tmp_path / "stage" / "stage.json", record)
        dtrain("merge", base, adapter_folder, tmp_path / dtype)
    assert equal(tmp_path / "out", state(tmp_path / "bfloat16"))
    assert not equal(tmp_path / "out", state(tmp_path / "float32"))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_base_with_remote_code_is_quantized_if_the_recipe_trusts_it(
    base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    adapter_folder = adapter(base, run / "domain" / "adapter")
    dtrain("merge", base, adapter_folder, tmp_path / "known", "--qlora-base", "dequantized")
    (base / "own.py").write_text(OWN_CODE)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = read_json(base / "config.json")
    write_json(base / "config.json", config | {"model_type": "own", "auto_map": names})
    trained_by(run / "domain", base, "qlora")
    for trusts in ("false", "true"):
        recipe = load_recipe("tiny", [f"model.trust_remote_code={trusts}"])
        (run / "recipe.yaml").write_text(dump(recipe))
        if trusts == "false":
            with pytest.raises(UserError, match="comes with its own Python code"):
                dtrain("merge", base, adapter_folder, tmp_path / "out")
    dtrain("merge", base, adapter_folder, tmp_path / "out")
    assert equal(tmp_path / "out", state(tmp_path / "known"))


def test_run_with_a_relative_base_path_is_merged_from_any_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_folder = adapter(base, tmp_path / "one")
    saved = checkpoint(tmp_path / "run", base, as_saved(adapter_folder), "lora")
    monkeypatch.chdir(base.parent)
    recipe = resolve(load_recipe("tiny", ["model.base=base", "engine.kind=ddp"]))
    (tmp_path / "run" / "recipe.yaml").write_text(dump(recipe))
    monkeypatch.chdir("/")
    dtrain("merge", saved, tmp_path / "out")
    assert equal(tmp_path / "out", by_peft(base, adapter_folder))


def test_corrupt_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = deepcopy(state(base))
    saved = checkpoint(tmp_path / "run", base, tensors, "full")
    shard = saved / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"rank-00001\.safetensors: was changed after it was saved"):
        dtrain("merge", saved, tmp_path / "out")


def test_verify_and_diff(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dtrain("merge", base, adapter(base, tmp_path / "one"), out)
    assert "files hashed, all finite" in dtrain("verify", out)
    assert "no merge.json, no hash checked, all finite" in dtrain("verify", base)
    said = dtrain("diff", base, out, "--top", 1, "--json", tmp_path / "all.json")
    assert "4 tensors changed" in said and "3 more" in said
    written = read_json(tmp_path / "all.json")
    assert len(written["changes"]) == 4 and written["equal"] == len(state(base)) - 4
    (out / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 2 and "config.json: was changed after it was written" in done.output
