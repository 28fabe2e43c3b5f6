"""The streaming merge equals PEFT's and refuses unsupported inputs."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from dtrain.config import schema
from dtrain.config.methods import Lora
from dtrain.core.errors import UserError
from dtrain.core.hash_cache import file_state, remember_hash
from dtrain.core.hashes import file_hash
from dtrain.core.locks import ShardLocks
from dtrain.core.weight_files import weight_files
from dtrain.merge import merge as module
from dtrain.merge import stream
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.merge import MergeJob, TrainedWeights
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.nf4 import Nf4Base
from dtrain.merge.provenance import model_fingerprint
from dtrain.methods.base import build_method
from dtrain.models.load import load_base
from tests.micro_batches import fill_lora_b

IDS = torch.arange(20)[None]
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def make_base(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, shard: str = "70KB"
) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


def make_adapter(base: Path, folder: Path, **settings: object) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    chosen = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"} | settings
    adapted = get_peft_model(model, LoraConfig(**chosen))
    torch.manual_seed(1)
    fill_lora_b(adapted, std=0.05)
    adapted.save_pretrained(folder, save_embedding_layers=False)  # as save_adapter does
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", LlamaConfig(**SMALL))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


def merge_adapter(
    base: Path,
    *adapters: Path,
    out: Path | None = None,
    quantized: bool = False,
    dtype: torch.dtype | None = None,
    processes: int = 1,
) -> Path:
    out = out or base.parent / "out"
    job = MergeJob(base, out, source="a base", processes=processes)
    nf4 = Nf4Base(job.tensors, dtype) if quantized else None
    opened = [MergeableAdapter.open(folder, job.tensors) for folder in adapters]
    job.merge_adapters([adapter_input(adapter, quantized_base=nf4) for adapter in opened])
    return out


def state(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in weight_files(folder) for n, t in load_file(path).items()}


def by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor for name, tensor in merged.state_dict().items()}


CASES = {
    "untied": (LlamaConfig(**SMALL, tie_word_embeddings=False), {}),
    "tied": (LlamaConfig(**SMALL, tie_word_embeddings=True), {}),
    "lm_head": (LlamaConfig(**SMALL), {"target_modules": ["lm_head", "q_proj"]}),
    "rslora": (LlamaConfig(**SMALL), {"use_rslora": True}),
    "patterns": (
        LlamaConfig(**SMALL),
        {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 40}},
    ),
    "transposed": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_merge_equals_peft_bit_for_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, settings = CASES[case]
    base = make_base(tmp_path / "base", config, dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    ours, theirs, before = state(merge_adapter(base, adapter)), by_peft(base, adapter), state(base)
    assert ours.keys() == before.keys() <= theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == dtype for n in ours)
    assert sum(not torch.equal(ours[n], before[n]) for n in ours) >= 3


def test_shard_layout_and_other_files_are_kept(base: Path, adapter: Path) -> None:
    (base / "special.py").write_text("code = 1")
    out = merge_adapter(base, adapter)
    kept = {p.name for p in base.iterdir()} - {"training_args.bin"}
    assert {p.name for p in out.iterdir()} == kept | {"merge.json"}
    for name in ("config.json", "chat_template.jinja", "tokenizer.json", "special.py"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (base / index).read_bytes()
    assert len(weight_files(out)) == len(weight_files(base)) > 2


def test_single_file_base_is_merged(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**SMALL), shard="1GB")
    out = merge_adapter(base, make_adapter(base, tmp_path / "adapter"))
    assert [p.name for p in weight_files(out)] == ["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(IDS).logits).all()


def test_manifest_lists_inputs_and_output_files(base: Path, adapter: Path) -> None:
    out = merge_adapter(base, adapter)
    manifest = json.loads((out / "merge.json").read_text())
    assert manifest["source"] == "a base"
    assert [(a["weight"], a["quantized_base"]) for a in manifest["adapters"]] == [(1.0, None)]
    assert manifest["base"] == model_fingerprint(base)
    assert manifest["result"] == model_fingerprint(out) != manifest["base"]
    files = {p.name: file_hash(p) for p in out.iterdir() if p.name != "merge.json"}
    assert manifest["files"] == files


def test_fingerprint_depends_on_content_and_not_on_names(base: Path) -> None:
    original = model_fingerprint(base)
    moved = shutil.copytree(base, base.parent / "moved")
    (moved / "README.md").write_text("new")
    assert model_fingerprint(moved) == original
    shard = weight_files(moved)[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert model_fingerprint(moved) != original


def trained_in_nf4(base: Path, folder: Path) -> nn.Module:
    settings = schema.Model(base=str(base))
    model = load_base(
        base, settings, quantized=True, dtype=torch.float32, device=torch.device("cpu")
    )
    lora = Lora(kind="qlora", r=8, dropout=0.0, target_modules=["q_proj", "down_proj"])
    method = build_method(lora)
    adapted = method.attach(model, seed=2)
    fill_lora_b(adapted, std=0.05)
    tensors = {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}
    method.save(folder, adapted, tensors)
    return adapted.eval()


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_merge_equals_the_trained_model(tied: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**SMALL, tie_word_embeddings=tied))
    trained = trained_in_nf4(base, tmp_path / "adapter")
    logits = trained(IDS).logits
    out = merge_adapter(base, tmp_path / "adapter", quantized=True)
    merged = AutoModelForCausalLM.from_pretrained(out)(IDS).logits
    assert torch.allclose(merged, logits, atol=1e-5)

    plain = AutoModelForCausalLM.from_pretrained(base)
    onto_plain = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(IDS).logits
    assert (onto_plain - logits).abs().max() > 1e-2  # what a merge onto the original would give

    unpacked = load_base(
        base, schema.Model(base="b"), quantized=True, dtype=torch.float32,
        device=torch.device("cpu"),
    ).dequantize()  # fmt: skip
    reference = PeftModel.from_pretrained(unpacked, tmp_path / "adapter").merge_and_unload()
    ours, theirs = state(out), reference.state_dict()
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours)


def test_quantized_merge_uses_the_training_dtype(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**SMALL), torch.bfloat16)
    trained = trained_in_nf4(base, tmp_path / "adapter")
    out = merge_adapter(base, tmp_path / "adapter", quantized=True, dtype=torch.float32)
    layer = trained.base_model.model.model.layers[0].self_attn
    name = "model.layers.0.self_attn.k_proj.weight"
    packed = layer.k_proj.weight
    computed_with = dequantize_4bit(packed.data, packed.quant_state)
    assert torch.equal(state(out)[name], computed_with.to(torch.bfloat16))


def test_full_weights_keep_the_layout_of_their_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**SMALL, tie_word_embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read(name: str, start: int, stop: int) -> Tensor:
        return tensors[name].flatten()[start:stop]

    job = MergeJob(base, tmp_path / "out", source="a base")
    job.replace_weights(TrainedWeights(shapes, read, content_hash="of the test"))
    ours = state(tmp_path / "out")
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[n], tensors[n]) for n in ours)
    with pytest.raises(UserError, match=r"other\.weight \[1\] is not in the base"):
        job.replace_weights(TrainedWeights({"other.weight": [1]}, read, content_hash=""))


# --- refusals: each names the culprit and leaves nothing behind -----------------------------


def edit_adapter(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, path)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_refused(base: Path, adapter: Path, match: str, quantized: bool = False) -> None:
    before = sorted(p.name for p in base.parent.iterdir())
    with pytest.raises(UserError, match=match):
        merge_adapter(base, adapter, quantized=quantized)
    assert sorted(p.name for p in base.parent.iterdir()) == before


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_unmatched_adapter_key_is_refused(base: Path, adapter: Path) -> None:
    lost = "base_model.model.model.layers.9.self_attn.q_proj"
    pair = {f"{lost}.lora_A.weight": torch.ones(8, 64), f"{lost}.lora_B.weight": torch.ones(64, 8)}
    edit_adapter(adapter, **pair)
    assert_refused(base, adapter, rf"{lost}\.lora_A\.weight matches nothing in the base")


@pytest.mark.parametrize("key", ["lora_A.weight", "lora_B.weight"])
def test_incomplete_lora_pair_is_refused(key: str, base: Path, adapter: Path) -> None:
    edit_adapter(adapter, **{f"{Q}.{key}": None})
    assert_refused(
        base, adapter, r"model\.layers\.0\.self_attn\.q_proj has only half of an adapter"
    )


def test_adapter_that_lacks_a_layer_is_refused(base: Path, adapter: Path) -> None:
    edit_adapter(adapter, **{f"{Q}.lora_{x}.weight": None for x in "AB"})
    assert_refused(base, adapter, r"names model\.layers\.0\.self_attn\.q_proj\.weight, of which")


def test_settings_without_their_tensors_are_refused(base: Path, adapter: Path) -> None:
    for setting, tensor in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        edit_config(adapter, **{setting: True})
        assert_refused(base, adapter, rf"has no {tensor}, but the config says {setting}: true")
        edit_config(adapter, **{setting: False})
    edit_adapter(adapter, **{f"{Q}.lora_magnitude_vector": torch.ones(64)})
    assert_refused(base, adapter, r"q_proj has a magnitude, but the config says use_dora: false")


def test_shape_mismatch_with_the_base_is_refused(base: Path, adapter: Path) -> None:
    edit_adapter(adapter, **{f"{Q}.lora_A.weight": torch.ones(8, 65)})
    assert_refused(
        base, adapter, r"q_proj\.weight is \[64, 64\] in the base, \[64, 65\] in the adapter"
    )


def test_rank_mismatch_between_a_and_b_is_refused(base: Path, adapter: Path) -> None:
    edit_adapter(adapter, **{f"{Q}.lora_A.weight": torch.ones(7, 64)})
    assert_refused(base, adapter, r"ranks of .*q_proj\.weight disagree")


def test_rank_mismatch_with_the_config_is_refused(base: Path, adapter: Path) -> None:
    edit_config(adapter, r=4)
    assert_refused(base, adapter, r"disagree: adapter_config\.json says 4, A is \[8, ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_adapter_is_refused(value: float, base: Path, adapter: Path) -> None:
    edit_adapter(adapter, **{f"{Q}.lora_B.weight": torch.full((64, 8), value)})
    assert_refused(base, adapter, rf"{Q}\.lora_B\.weight is not finite")


def test_overflow_of_the_base_dtype_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**SMALL), torch.float16)
    adapter = make_adapter(base, tmp_path / "adapter")
    edit_adapter(adapter, **{f"{Q}.lora_B.weight": torch.full((64, 8), 1e9)})
    assert_refused(base, adapter, r"q_proj\.weight is not finite in F16")


def test_hostile_patterns_are_matched_in_linear_time_or_refused(base: Path, adapter: Path) -> None:
    edit_config(adapter, rank_pattern={r"((\w|\.)+)+-": 3})  # years, by backtracking
    assert MergeableAdapter.open(adapter, MergeJob(base, base / "out", "x").tensors).layers
    edit_config(adapter, rank_pattern={"(?=q)q_proj": 3})
    assert_refused(base, adapter, "linear time")
    edit_config(adapter, rank_pattern=["q_proj"])
    assert_refused(base, adapter, "rank_pattern: input should be a valid dictionary")


def test_unsupported_adapter_types_are_refused(base: Path, adapter: Path) -> None:
    edit_config(adapter, peft_type="LOHA")
    assert_refused(base, adapter, "not the config of an adapter that merges")
    edit_config(adapter, peft_type="LORA", init_lora_weights="pissa_niter_4")
    assert_refused(base, adapter, "removes a component from the base")
    edit_config(adapter, init_lora_weights=True)
    edit_adapter(adapter, **{f"{Q}.lora_of_tomorrow": torch.ones(64)})
    assert_refused(base, adapter, "lora_of_tomorrow belongs to an unknown method")


def test_pickled_and_truncated_adapters_are_refused(base: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert_refused(base, adapter, r"adapter_model\.safetensors: is not a complete safetensors file")
    weights.rename(adapter / "adapter_model.bin")
    assert_refused(base, adapter, r"no adapter_model\.safetensors")


def test_index_path_outside_its_folder_is_refused(base: Path, adapter: Path) -> None:
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../outside/x.safetensors"
    index.write_text(json.dumps(content))
    assert_refused(base, adapter, r"points outside its folder: '\.\./outside/x\.safetensors'")


def test_truncated_base_is_refused(base: Path, adapter: Path) -> None:
    shard = weight_files(base)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(base, adapter, f"{shard.name}: not a whole safetensors file")


def test_output_that_exists_or_is_the_base_is_refused(base: Path, adapter: Path) -> None:
    before = model_fingerprint(base)
    for out, match in ((base, "would overwrite the base"), (base.parent, "exists already")):
        with pytest.raises(UserError, match=match):
            merge_adapter(base, adapter, out=out)
    assert model_fingerprint(base) == before


def test_insufficient_disk_space_is_refused(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(9, 9, 1_000_000))
    assert_refused(base, adapter, r"the merged model needs .* MB, 1 MB are free")


def test_quantized_base_on_disk_is_refused(base: Path, adapter: Path) -> None:
    path = base / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    assert_refused(base, adapter, "already quantized", quantized=True)


def test_interrupted_merge_resumes_with_missing_shards(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = state(merge_adapter(base, adapter, out=base.parent / "whole"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr("shutil.copyfile", full)
        merge_adapter(base, adapter)
    assert sorted(p.name for p in base.parent.iterdir()) == [
        ".out.making", "adapter", "base", "whole"
    ]  # fmt: skip
    shard = weight_files(base)[0].name
    unfinished = base.parent / ".out.making" / "model"
    first = (unfinished / shard).stat()
    (unfinished / weight_files(base)[1].name).write_bytes(b"half a shard")
    (unfinished / ".merge.json.k1ll3d").write_bytes(b"being written")
    out = merge_adapter(base, adapter)
    assert (out / shard).stat().st_ino == first.st_ino  # not made again
    assert (out / shard).stat().st_mtime_ns == first.st_mtime_ns
    after = state(out)
    assert all(torch.equal(after[name], whole[name]) for name in whole)
    assert {p.name for p in out.iterdir()} == {p.name for p in (base.parent / "whole").iterdir()}
    assert not (base.parent / ".out.making").exists()
    assert merge_adapter(base, adapter) == out  # it is there already, from the same


@pytest.mark.parametrize("alike", [True, False])
def test_merge_finished_before_the_lock_is_detected(
    alike: bool, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, out = ShardLocks.acquire, base.parent / "out"
    edit_config(adapter, lora_alpha=12)

    def late(claims: ShardLocks, number: int, **how: bool) -> bool:
        monkeypatch.setattr(ShardLocks, "acquire", acquire)
        edit_config(adapter, lora_alpha=12 if alike else 99)
        merge_adapter(base, adapter)
        edit_config(adapter, lora_alpha=12)
        return acquire(claims, number, **how)

    monkeypatch.setattr(ShardLocks, "acquire", late)
    if alike:
        merge_adapter(base, adapter)
    else:
        with pytest.raises(UserError, match="exists already"):
            merge_adapter(base, adapter)
    assert (out / "merge.json").is_file() and not (base.parent / ".out.making").exists()


def test_interrupted_merge_does_not_resume_from_other_inputs(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr("shutil.copyfile", full)
        merge_adapter(base, adapter)
    edit_config(adapter, lora_alpha=99)
    theirs = by_peft(base, adapter)
    ours = state(merge_adapter(base, adapter))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match="exists already"):
        edit_config(adapter, lora_alpha=1)
        merge_adapter(base, adapter)


@pytest.mark.parametrize("known", [True, False])
def test_tensors_at_unaligned_offsets_are_merged(known: bool, tmp_path: Path) -> None:
    """An odd number of bytes precedes the tensor, so elements cross write boundaries."""
    base, wide = tmp_path / "base", torch.randn(192, 8192)
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"w.weight": wide.bfloat16()}, base / "model.safetensors")
    path, length = base / "model.safetensors", wide.numel() * 2
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w.weight": {"dtype": "BF16", "shape": [192, 8192], "data_offsets": [3, 3 + length]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"odd" + path.read_bytes()[-length:])
    if known:
        remember_hash(path, file_hash(path), file_state(path), written_here=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.randn(4, 8192), torch.randn(192, 4)
    key = "base_model.model.w.lora_"
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    out = merge_adapter(base, adapter)
    written = (out / path.name).read_bytes()
    assert written[:-length] == path.read_bytes()[:-length]
    actual = torch.frombuffer(bytearray(written[-length:]), dtype=torch.bfloat16)
    assert torch.equal(actual.view(192, 8192), ((b @ a) * 2 + wide.bfloat16().float()).bfloat16())
    manifest = json.loads((out / "merge.json").read_text())
    assert manifest["base"] == model_fingerprint(base)
    assert manifest["files"][path.name] == file_hash(out / path.name)


def test_unwritable_output_is_reported(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        merge_adapter(base, adapter, out=tmp_path / "file" / "out")


def test_full_disk_is_reported_and_a_rerun_resumes(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, block: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stream, "write_all", full)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            merge_adapter(base, adapter)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert state(merge_adapter(base, adapter)).keys() == state(base).keys()


def test_mismatched_base_is_reported_before_the_merge(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in weight_files(base):
        remember_hash(path, file_hash(path), file_state(path), written_here=True)
    monkeypatch.setattr(module, "rewrite_file", None)
    job = MergeJob(base, base.parent / "out", source="a base", expected_bases=["another"])
    inputs = [adapter_input(MergeableAdapter.open(adapter, job.tensors))]
    with pytest.raises(UserError, match="is not the base that the adapter was trained on"):
        job.merge_adapters(inputs)
    assert not (base.parent / ".out.making").exists()


def test_base_that_changes_after_its_hash_was_looked_up_is_reported(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weight_files(base)[0]
    remember_hash(path, file_hash(path), file_state(path), written_here=True)
    lookup = stream.lookup_hash

    def change_after_lookup(source: Path) -> str | None:
        digest = lookup(source)
        with open(source, "ab") as file:
            file.write(b"x")
        return digest

    monkeypatch.setattr(stream, "lookup_hash", change_after_lookup)
    with pytest.raises(UserError, match="changed while it was read"):
        merge_adapter(base, adapter)


def test_missing_folder_is_reported(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        merge_adapter(base, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no adapter_config\.json in it"):
        merge_adapter(base, base)
    with pytest.raises(UserError, match="there is no such folder"):
        weight_files(tmp_path / "nowhere")
