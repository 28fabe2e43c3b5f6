"""Mixtures of experts: LoRA on routed tokens, loading, NF4 and merging, against PEFT and bnb."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config import schema
from dtrain.config.methods import AdaLora, Full, Ia3, Lora, Vera
from dtrain.core.errors import UserError
from dtrain.core.weight_files import read_headers
from dtrain.merge import from_checkpoint
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.merge import MergeJob, check_mergeable
from dtrain.merge.merge_inputs import adapter_input
from dtrain.methods.base import build_method
from dtrain.models.check_base import open_model
from dtrain.models.expert_layers import expert_parameters
from dtrain.models.expert_nf4 import expert_states
from dtrain.models.kernels import experts
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.load import freeze_for_training, load_base, read_config
from dtrain.models.packing_probe import probe_packing
from dtrain.models.parameter_counts import parameter_counts
from dtrain.objectives.base import adapters_disabled
from dtrain.objectives.regularizers.fisher import penalized_layers
from dtrain.pipeline.initial_adapter import check_initial_adapter
from dtrain.samples.tiny_llama import build_tokenizer
from dtrain.serving.adapter_list import read_adapter
from dtrain.serving.generator import TextGenerator
from dtrain.serving.run_models import ServedModel
from tests.unit.models.mixtures import (
    COMMON,
    CPU,
    EXPERTS,
    IDS,
    MODELS,
    adapted,
    logits,
    plain,
    saved,
    streamed,
    write_mixture,
)

KINDS = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(kind)` → the folder of a small random model."""
    return partial(write_mixture, tmp_path)


@KINDS
def test_the_files_tensors_of_experts_are_streamed(write: Callable, kind: str) -> None:
    folder = write(kind)
    base = streamed(folder)
    base.materialize(base.model)
    expected = plain(folder).state_dict()
    assert base.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in base.model.state_dict().items())


@KINDS
def test_routed_experts_compute_what_peft_does(write: Callable, kind: str) -> None:
    _, model = adapted(write(kind))
    reference = copy.deepcopy(model)
    assert patch_modules(model)["experts"] == COMMON["num_hidden_layers"]
    for one in (model, reference):
        logits(one).square().mean().backward()
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    wanted = dict(reference.named_parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(".experts." in name for name in trained) == 4 * COMMON["num_hidden_layers"]
    for name, parameter in trained.items():
        assert wanted[name].grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)


@KINDS
@pytest.mark.parametrize("rank", [8, 4])
def test_the_grouped_product_of_gpus_takes_what_it_is_given(
    write: Callable, kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch checks on a CPU, too, that operands are laid out as the kernel of a GPU reads them."""
    _, model = adapted(write(kind), r=rank)
    patch_modules(model.bfloat16())
    results, shapes = [], set()

    def counted(x: Tensor, matrices: Tensor, **more: Any) -> Tensor:
        shapes.add((x.dim(), matrices.dim()))
        return torch.nn.functional.grouped_mm(x, matrices, **more)

    monkeypatch.setattr(experts, "functional", SimpleNamespace(grouped_mm=counted))
    for has_kernel in (False, True):
        monkeypatch.setattr(experts, "_has_grouped_kernel", lambda device, has=has_kernel: has)
        model.zero_grad()
        output = logits(model)
        output.float().square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([output.detach(), *gradients])
    assert shapes == {(2, 3), (2, 2)}
    for separate, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, separate, rtol=2e-2, atol=2e-2)


def test_experts_are_grouped_where_torch_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere torch's product is a loop that reads the groups from the device in each call."""
    grouped = []
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, is_=capability: is_)
        grouped.append(experts._has_grouped_kernel.__wrapped__(torch.device("cuda")))
    assert grouped == [False, False, True, True, False]
    assert not experts._has_grouped_kernel(CPU)


def test_ten_steps_have_the_losses_of_pefts_target_parameters(write: Callable) -> None:
    folder = write("qwen3_moe")
    _, model = adapted(folder)
    patch_modules(model)
    names = [n for n, m in plain(folder).named_modules() if isinstance(m, nn.Linear)]
    config = LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM",
        target_modules=[name for name in names if name != "lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    peft = get_peft_model(plain(folder), config)
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])
    losses = []
    for one in (model, peft):
        trained = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = nn.functional.cross_entropy(logits(one)[:-1], IDS[0, 1:])
            losses[-1].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@KINDS
@pytest.mark.parametrize("kernels", [True, False])
def test_without_its_adapters_a_model_is_its_base(
    write: Callable, kind: str, kernels: bool
) -> None:
    folder = write(kind)
    _, model = adapted(folder, router="train")
    if kernels:
        patch_modules(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.neg_()
        trained = logits(model)
        with adapters_disabled(model):
            reference = logits(model)
        base = logits(plain(folder))
        torch.testing.assert_close(reference, base, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(model), trained)
    assert not torch.allclose(trained, base, atol=1e-2)


def test_no_penalty_takes_the_adapters_of_experts_for_those_of_one_layer(write: Callable) -> None:
    folder = write("qwen3_moe")
    with pytest.raises(UserError, match="no penalty on the adapters of experts"):
        penalized_layers(adapted(folder)[1])
    assert penalized_layers(adapted(folder, experts=False)[1])


@KINDS
def test_a_merge_writes_experts_in_nf4_without_adapters_too(write: Callable, kind: str) -> None:
    folder = write(kind)
    experts = expert_parameters(plain(folder)).keys()
    method, base = build_method(Lora(kind="qlora", experts=False)), streamed(folder, quantized=True)
    model = method.attach(base.model, seed=1, device=CPU)
    before = method.changed_tensors(model)  # as at the start, when a merge is checked
    base.materialize(model)
    assert experts and experts <= before == method.changed_tensors(model)


def test_an_expert_without_tokens_gets_a_gradient_of_zero(write: Callable) -> None:
    _, model = adapted(write("qwen3_moe"))
    patch_modules(model)
    token = model(input_ids=IDS[:, :1], use_cache=False).logits
    token.square().mean().backward()
    weights = [p for n, p in model.named_parameters() if "experts.lora_A" in n]
    by_expert = weights[0].grad.view(EXPERTS, 4, -1).abs().amax((1, 2))
    assert (by_expert > 0).sum() == COMMON["num_experts_per_tok"]


@KINDS
def test_adapters_are_read_again_in_the_backward_pass(write: Callable, kind: str) -> None:
    """ZeRO-3 frees them after a layer's forward pass, and gathers them into other memory."""
    _, model = adapted(write(kind))
    patch_modules(model)
    weights = [p for n, p in model.named_parameters() if "experts" in n and "lora_" in n]
    found = []
    for moves in (False, True):
        loss = logits(model).square().mean()
        for parameter in weights if moves else ():
            freed, parameter.data = parameter.data, parameter.data.clone()
            freed.zero_()
        found.append(torch.autograd.grad(loss, weights))
    assert len(weights) == 8
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second) and first.any()


@KINDS
def test_a_saved_adapter_is_loaded_by_peft(write: Callable, kind: str, tmp_path: Path) -> None:
    folder = write(kind)
    method, model = adapted(folder)
    adapter = saved(method, model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(plain(folder), adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    in_peft = {n.replace(".default", "") for n, _ in loaded.named_parameters() if "lora_" in n}
    assert in_peft == stored.keys()
    listed = read_adapter(adapter)
    assert listed.ranks == [4] and {"gate_up_proj", "down_proj"} <= {*listed.targets}
    assert not {"experts", "base_layer"} & {*listed.targets}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("quantized", [False, True])
def test_a_merged_model_computes_what_its_adapter_does(
    write: Callable, kind: str, quantized: bool, tmp_path: Path
) -> None:
    from dtrain.merge.nf4 import Nf4Base

    folder = write(kind)
    method, model = adapted(folder, quantized=quantized)
    patch_modules(model)
    check_mergeable(folder, method.changed_tensors(model))
    adapter = saved(method, model, tmp_path / "adapter")
    job = MergeJob(folder, tmp_path / "merged", source="test")
    nf4 = Nf4Base(job.tensors, torch.float32) if quantized else None
    change = adapter_input(MergeableAdapter.open(adapter, job.tensors), quantized_base=nf4)
    job.merge_adapters([change])
    merged = plain(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(plain(folder)), atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"2.down_proj": (32, 17)}, {}, r"experts\.2\.down_proj.* is \[32, 17\] .* \[32, 16\]"),
        ({"4.up_proj": (16, 32)}, {}, r"5 tensors like .*experts\.4\.up_proj.*, but 4 like"),
        ({}, {"num_local_experts": 5}, r"_proj has 4 experts in the files, but 5 by config\.json"),
        ({}, {"moe_intermediate_size": 24}, r"\[4, 32, 16\], but it is \[4, 32, 24\] by config"),
    ],
)
def test_experts_of_other_sizes_are_refused_before_any_is_read(
    write: Callable, changes: dict[str, tuple[int, ...]], config: dict[str, int], message: str
) -> None:
    folder = write("qwen3_moe")
    tensors, layer = load_file(folder / "model.safetensors"), "model.layers.1.mlp"
    for name, shape in changes.items():
        tensors[f"{layer}.experts.{name}.weight"] = torch.zeros(shape)
    if "num_local_experts" in config:  # a router of five, for four experts
        for number in range(2):
            tensors[f"model.layers.{number}.mlp.gate.weight"] = torch.zeros(5, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    with pytest.raises(UserError, match=message) as refused:
        streamed(folder)
    assert refused.value.where == str(folder)


@pytest.mark.parametrize(
    ("targets", "keys"),
    [
        (["down_proj"], {}),
        (["q_proj", "gate_up_proj"], {"rank_pattern": {"experts.gate_up_proj": 2}}),
        ("all-linear", {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"gate_up_proj": 3.0}}),
    ],
)
def test_experts_are_named_by_their_parameters(
    write: Callable, targets: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    """As targets, alone too, and in patterns; as PEFT, a merge and a merge of a checkpoint do."""
    folder = write("qwen3_moe")
    method, model = adapted(folder, target_modules=targets, **keys)
    assert any(".experts." in name for name, p in model.named_parameters() if p.requires_grad)
    adapter = saved(method, model, tmp_path / "adapter")
    expected = logits(model.eval())
    loaded = logits(PeftModel.from_pretrained(plain(folder), adapter))
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    checkpoint: Any = SimpleNamespace(
        names={name: tuple(p.shape) for name, p in parameters.items()},
        folder=adapter,
        read=lambda name, kind, start, stop: parameters[name].flatten()[start:stop],
    )
    settings = method.settings.model_dump()
    step: Any = SimpleNamespace(checkpoint=checkpoint, origin=SimpleNamespace(method=settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_checkpoint, "_new_token_rows", lambda saved: {})
        patch.setattr(from_checkpoint, "file_hash", lambda path: "")
        for number in range(2):
            job = MergeJob(folder, tmp_path / f"merged{number}", source="test")
            opened = (
                from_checkpoint.checkpoint_adapter(step, job.tensors)
                if number
                else MergeableAdapter.open(adapter, job.tensors)
            )
            job.merge_adapters([adapter_input(opened)])
            merged = logits(plain(tmp_path / f"merged{number}"))
            torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Ia3(kind="ia3"), "'down_proj' names weights of experts, which get no adapter"),
        (Lora(kind="lora", experts=False, target_modules=["down_proj"]), "names weights of exp"),
        (Lora(kind="lora", target_modules=["gate_proj"]), "choose from: down_proj, gate_up_proj, "),
        (Lora(kind="lora", rank_pattern={"experts": 2}), "no layer with an adapter is named"),
        (Full(kind="full", frozen_modules=["gate"], router="train"), "would train and stay frozen"),
    ],
)
def test_names_that_do_not_fit_experts_and_routers_are_refused(
    write: Callable, settings: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_method(settings).attach(plain(write("qwen3_moe")), seed=0)


@pytest.mark.parametrize("settings", [Vera(kind="vera"), AdaLora(kind="adalora")])
def test_experts_without_adapters_are_said(write: Callable, settings: Any, capfd: Any) -> None:
    build_method(settings).attach(plain(write("qwen3_moe")), seed=0)
    layers = COMMON["num_hidden_layers"]
    assert f"the experts of {layers} layers stay as they are" in "".join(capfd.readouterr())


@KINDS
def test_experts_in_nf4_are_those_of_bitsandbytes(write: Callable, kind: str) -> None:
    folder = write(kind)
    base = streamed(folder, quantized=True)
    base.materialize(base.model)
    stored = load_file(folder / "model.safetensors")
    whole = dict(plain(folder).named_parameters())
    for name in expert_parameters(plain(folder)):
        module = base.model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        states = expert_states(module, leaf)
        assert states is not None
        apart = 2 if name not in stored and leaf == "gate_up_proj" else 1
        for expert, values in enumerate(whole[name].detach()):
            packs = [
                quantize_4bit(x.contiguous(), compress_statistics=True, quant_type="nf4")
                for x in values.chunk(apart)
            ]
            expected = torch.cat([dequantize_4bit(*pack) for pack in packs])
            actual = states.matrix(getattr(module, leaf), expert)
            assert torch.equal(actual, expected)
    assert parameter_counts(base.model)[1] == parameter_counts(plain(folder))[1]


def test_a_served_adapter_answers_from_experts_in_nf4(write: Callable, tmp_path: Path) -> None:
    folder = write("mixtral")
    build_tokenizer().save_pretrained(folder)
    method, model = adapted(folder, quantized=True)
    choice = ServedModel(str(folder), True, (saved(method, model.eval(), tmp_path / "adapter"),))
    served = TextGenerator(choice, schema.Model(base="of the choice"), CPU)
    patch_modules(model)
    assert torch.allclose(served.logits(IDS)[0], logits(model), atol=1e-4)


def test_experts_stay_without_adapters_if_the_recipe_says_so(write: Callable) -> None:
    _, model = adapted(write("qwen3_moe"), experts=False)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and not any(".experts." in name for name in trained)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_an_adapter_of_other_experts_is_refused(write: Callable, kind: str, tmp_path: Path) -> None:
    key = "num_experts" if kind == "qwen3_moe" else "num_local_experts"
    method, model = adapted(write(kind))
    adapter = saved(method, model, tmp_path / "adapter")
    other = BaseTensors(write(kind, **{key: 2 * EXPERTS}))
    with pytest.raises(UserError, match="has 8 experts in the base"):
        MergeableAdapter.open(adapter, other)


@pytest.mark.parametrize("key", ["num_experts", "model_type", "quantization_config"])
def test_a_merge_names_a_config_that_it_cannot_read(
    write: Callable, key: str, tmp_path: Path
) -> None:
    folder = write("qwen3_moe")
    method, model = adapted(folder)
    adapter = saved(method, model, tmp_path / "adapter")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: "4"}))
    with pytest.raises(UserError, match=r"model cannot be built: .*(expected int|`4`|to_dict)"):
        MergeableAdapter.open(adapter, BaseTensors(folder))


def test_a_merge_names_experts_that_do_not_stack(write: Callable, tmp_path: Path) -> None:
    folder = write("qwen3_moe")
    method, model = adapted(folder)
    adapter = saved(method, model, tmp_path / "adapter")
    tensors = load_file(folder / "model.safetensors")
    up = "model.layers.1.mlp.experts.{}.up_proj.weight"
    tensors[up.format(EXPERTS)] = tensors[up.format(0)].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"files' tensors do not make .*layers.1") as error:
        MergeableAdapter.open(adapter, BaseTensors(folder))
    assert error.value.where == str(folder)


# In the middle, the last of a layer, and all of it that one layer has.
@pytest.mark.parametrize("missing", ["2.up_proj.weight", "3.down_proj.weight", "3."])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_missing_expert_is_named_before_anything_is_read(
    write: Callable, missing: str, sharded: bool
) -> None:
    folder = write("qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    gone = f"model.layers.1.mlp.experts.{missing}"
    kept = {name: t for name, t in tensors.items() if not name.startswith(gone)}
    assert kept.keys() < tensors.keys()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    if sharded:
        (folder / "model.safetensors").rename(folder / "all.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "all.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text("{}")

    def loaded(path: Path) -> Any:
        settings = schema.Model(base=str(path))
        return load_base(path, settings, quantized=False, dtype=torch.float32, device=CPU)

    for read in (open_model, streamed, BaseTensors, loaded):  # check, train, merge, generate
        with pytest.raises(UserError, match=rf"{gone}.* is in no file of the model"):
            read(folder)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("hunyuan_v1_moe", "moe_topk"),
        ("ernie4_5_moe", "moe_k"),
        ("llama4_text", "num_experts_per_tok"),
    ],
)
def test_more_experts_a_token_than_there_are_is_refused(
    write: Callable, kind: str, key: str
) -> None:
    folder = write(kind)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: 2 * EXPERTS}))
    with pytest.raises(UserError, match=f"uses {2 * EXPERTS} of {EXPERTS} experts") as error:
        read_config(folder, trust_remote_code=False)
    assert error.value.where == str(folder / "config.json")


def test_experts_that_do_not_stack_are_refused(write: Callable) -> None:
    folder = write("qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = schema.Model(base=str(folder))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.1\.up_proj") as error:
        load_base(folder, settings, quantized=False, dtype=torch.float32, device=CPU)
    assert error.value.where == str(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": [4, 2]},
        {"text_config": {"num_experts": 4}, "vision_config": {"num_experts": 2}},
        {"num_experts": 4, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
    ],
)
def test_layers_may_have_different_experts(config: dict[str, Any], tmp_path: Path) -> None:
    names = {f"{x}.mlp.experts.{n}.w" for x, count in (("a", 4), ("b", 2)) for n in range(count)}
    names.add("a.mlp.experts.1.activation_scale")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert BaseTensors(tmp_path).keys() == names


def test_an_adapter_that_peft_made_continues(write: Callable, tmp_path: Path) -> None:
    folder = write("qwen3_moe")
    linears = {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    theirs = LoraConfig(
        r=4, lora_alpha=8.0, target_modules=linears, target_parameters=experts, lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    made = get_peft_model(plain(folder), theirs)
    made.save_pretrained(tmp_path / "adapter")
    keys = {"kind": "lora", "r": 4, "alpha": 8.0, "from_adapter": str(tmp_path / "adapter")}
    _, model = adapted(folder, alpha=8.0)
    initial = check_initial_adapter(SimpleNamespace(method=Lora(**keys)), model)
    wanted = {n.replace(".default", ""): p for n, p in made.named_parameters() if "lora_" in n}
    assert {initial.keys[n] for n, p in model.named_parameters() if p.requires_grad} == {*wanted}
    assert all(torch.equal(initial.read(n), wanted[key]) for n, key in initial.keys.items())
    half = {"kind": "lora", "r": 4, "alpha": 8.0, "target_modules": [*linears, "down_proj"]}
    _, model = adapted(folder, **half)
    with pytest.raises(UserError, match="target_parameters"):
        check_initial_adapter(SimpleNamespace(method=Lora(**half | keys)), model)


def test_an_adapter_of_other_experts_does_not_continue(write: Callable, tmp_path: Path) -> None:
    method, model = adapted(write("qwen3_moe"))
    adapter = str(saved(method, model, tmp_path / "adapter"))
    _, other = adapted(write("qwen3_moe", num_experts=2 * EXPERTS))
    keys = {"kind": "lora", "r": 4, "dropout": 0.0, "from_adapter": adapter}
    with pytest.raises(UserError, match=r"lora_A.weight is \[16, 32\] in it, \[32, 32\] here"):
        check_initial_adapter(SimpleNamespace(method=Lora(**keys)), other)


@KINDS
def test_documents_of_a_packed_sequence_are_separate(write: Callable, kind: str) -> None:
    folder = write(kind)
    config = AutoConfig.from_pretrained(folder)
    assert probe_packing(config, schema.Model(base=str(folder))).packed


def test_a_block_does_not_draw_its_input_at_random(write: Callable) -> None:
    folder = write("mixtral", router_jitter_noise=0.5)
    base = streamed(folder)
    base.materialize(base.model)
    assert torch.equal(logits(base.model.train()), logits(plain(folder)))


@pytest.mark.parametrize("kind", ["dbrx", "jetmoe", "longcat_flash"])
def test_experts_that_code_of_their_own_computes_stay_as_they_are(
    save_small: Callable, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All other layers get adapters, but no router, whichever way it is called."""
    model = save_small(kind, tmp_path)
    read_config(tmp_path, trust_remote_code=False)
    settings = Lora(kind="lora", r=2, dropout=0.0)
    with pytest.raises(UserError, match="computed by code of its own") as refused:
        build_method(settings).attach(model, seed=0)
    assert refused.value.fix.startswith("method.experts=false")
    method = build_method(settings.model_copy(update={"experts": False}))
    adapters = method.attach(model, seed=0)
    assert "the experts of this model" in capsys.readouterr().out
    names = {n for n, p in adapters.named_parameters() if p.requires_grad}
    assert any("attn" in n or "attention" in n for n in names)
    assert not any("router" in n for n in names)
    adapters(torch.arange(4, 24)[None], use_cache=False).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in adapters.parameters() if p.requires_grad)


def test_experts_of_their_own_code_call_no_hooks_inside(save_small: Callable) -> None:
    """Ranks of ZeRO-3 would wait for one another once an expert that has tokens."""
    model = AutoModelForCausalLM.from_config(save_small("dbrx", None))
    freeze_for_training(model, schema.Model(base="unused"))
    names = ["transformer.blocks.0.ffn", "transformer.blocks.0.ffn.experts.mlp"]
    calls: list[str] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    logits(model)
    assert calls == names[:1]


def test_experts_without_a_last_matrix_may_lack_it(tmp_path: Path) -> None:
    """Those of LongCat Flash that return their input; no other expert may."""
    (tmp_path / "config.json").write_text('{"n_routed_experts": 6, "zero_expert_num": 2}')
    names = {f"layers.0.mlp.experts.{n}.gate_proj.weight" for n in range(8)}
    names |= {f"layers.0.mlp.experts.{n}.down_proj.weight" for n in range(6)}
    tensors = {name: torch.zeros(2, 2) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    read_headers(tmp_path)
    del tensors["layers.0.mlp.experts.2.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"experts\.2\.down_proj\.weight is in no file"):
        read_headers(tmp_path)
