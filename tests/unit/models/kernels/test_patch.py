"""A model with kernels computes what it computes without them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.data.loader import MicroBatch
from dtrain.methods.base import build_method
from dtrain.models.dropout import set_dropout_key
from dtrain.models.kernels import fused_cross_entropy, lora_linear, native
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import load_base
from dtrain.models.loss import target_logits, target_losses
from tests.micro_batches import micro_batch

CPU = torch.device("cpu")
LENGTHS = [5, 1, 17, 9]
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama-biased": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.5),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
LORA = Lora(kind="lora", r=4)  # with dropout
METHODS = {
    "lora": LORA,
    "no dropout": LORA.model_copy(update={"dropout": 0.0}),
    "some layers": LORA.model_copy(update={"target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "qlora": LORA.model_copy(update={"kind": "qlora"}),
    "full": Full(kind="full"),
}


def saved(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones would hide mistakes
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


def build(folder: Path, method: Full | Lora, kernels: str, **settings: object) -> nn.Module:
    chosen = schema.Model(base=str(folder), kernels=kernels, **settings)  # type: ignore[arg-type]
    quantized = method.kind == "qlora"
    base = load_base(folder, chosen, quantized=quantized, dtype=torch.float32, device=CPU)
    model = build_method(method).attach(base, seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it starts at zero; of 1.0, float32's own rounding would decide
            seeded = torch.Generator().manual_seed(len(name))
            nn.init.normal_(parameter, std=0.3, generator=seeded)
    apply_kernels(model, chosen)
    return model.train()


def batch() -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = sum(LENGTHS)
    ids = torch.randint(0, 64, (tokens,), generator=generator)
    return micro_batch(ids, LENGTHS, [7, 8], [23, tokens - 23])


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    row = batch()
    set_dropout_key(model, 1, 2, row.sequences, row.sequence_lengths)
    loss, _ = target_losses(model, row)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(fast: nn.Module, plain: nn.Module, tolerance: float = 2e-5) -> None:
    loss, gradients = loss_and_gradients(fast)
    expected, expected_value = loss_and_gradients(plain)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradients.keys() == expected_value.keys()
    for name, gradient in gradients.items():
        scale = expected_value[name].abs().max()
        assert torch.allclose(gradient / scale, expected_value[name] / scale, atol=tolerance), name


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four tokens a chunk of the loss, so that there are several and a rest."""
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda vocabulary: 4)
    yield


@pytest.fixture(autouse=True, params=["loops", "torch"])
def who_computes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything holds with the compiled loops and where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(native, "load_loops", lambda: (None, ""))
    yield
    native.set_enabled(on=False)


@pytest.mark.parametrize("method", METHODS)
def test_same_loss_and_gradients_for_every_method(method: str, tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama"], tmp_path)
    assert_alike(*(build(folder, METHODS[method], k) for k in ("auto", "off")))


@pytest.mark.parametrize("name", CONFIGS)
def test_same_loss_and_gradients_for_every_architecture(name: str, tmp_path: Path) -> None:
    folder = saved(CONFIGS[name], tmp_path)
    assert_alike(*(build(folder, LORA, k) for k in ("auto", "off")))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_same_with_gradient_checkpointing(method: str, tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama"], tmp_path)
    recomputed = build(folder, METHODS[method], "auto", gradient_checkpointing=True)
    assert_alike(recomputed, build(folder, METHODS[method], "off"))


def test_summary_names_the_patched_modules(tmp_path: Path) -> None:
    summaries = {}
    for name in ("llama", "gemma2", "gpt2"):
        folder = saved(CONFIGS[name], tmp_path / name)
        chosen = schema.Model(base=str(folder))
        base = load_base(folder, chosen, quantized=False, dtype=torch.float32, device=CPU)
        summaries[name] = apply_kernels(build_method(LORA).attach(base, seed=0), chosen)
    assert summaries["llama"] == (
        "14 adapted layers, 5 norms, 2 MLPs, 2 rotary embeddings, 1 chunked loss"
    )
    assert summaries["gemma2"] == (
        "14 adapted layers, 2 rotary embeddings, 1 chunked loss; not replaced: norms, MLPs"
    )
    assert summaries["gpt2"].startswith("1 chunked loss; not replaced")


def test_half_precision_error_is_no_larger_than_without_kernels(tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama"], tmp_path)
    exact, expected_value = loss_and_gradients(build(folder, METHODS["no dropout"], "off"))
    errors = []
    for kernels in ("auto", "off"):
        model = build(folder, METHODS["no dropout"], kernels)
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data = parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = loss_and_gradients(model)
        assert all(g.dtype == torch.float32 for g in gradients.values())
        offs = [(gradients[n] - w).norm() / w.norm() for n, w in expected_value.items()]
        errors.append([abs(loss / exact - 1).item(), torch.stack(offs).mean().item()])
    (loss_off, off), (plain_loss_off, plain_off) = errors
    assert loss_off < 2 * plain_loss_off + 1e-3 and off < 1.2 * plain_off


def test_generation_and_logits_do_not_change(tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama"], tmp_path)
    fast, plain = (build(folder, LORA, k).eval() for k in ("auto", "off"))
    ids = batch().input_ids[:, :8]
    with torch.no_grad():
        assert torch.allclose(
            target_logits(fast, batch()), target_logits(plain, batch()), atol=1e-5
        )
        a, b = (m.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for m in (fast, plain))
    assert torch.equal(a, b)


def test_disabled_adapter_is_not_computed(tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama"], tmp_path)
    fast, plain = (build(folder, LORA, k).eval() for k in ("auto", "off"))
    with torch.no_grad(), fast.disable_adapter(), plain.disable_adapter():
        result, expected_value = (target_losses(model, batch())[0] for model in (fast, plain))
    assert result.item() == pytest.approx(expected_value.item(), rel=1e-6)


def test_layer_called_with_another_input_computes_alone(tmp_path: Path) -> None:
    folder = saved(CONFIGS["llama"], tmp_path)
    fast, plain = (build(folder, METHODS["no dropout"], k) for k in ("auto", "off"))
    x, y = torch.randn(2, 1, 4, 64)
    results = []
    for model in (fast, plain):
        adapted = {
            n.rsplit(".", 1)[-1]: m
            for n, m in model.named_modules()
            if isinstance(m, LoraLayer) and ".layers.1." in n
        }
        called = [("q_proj", x), ("k_proj", y), ("v_proj", x), ("v_proj", y), ("k_proj", x)]
        results.append(torch.cat([adapted[name](value) for name, value in called], dim=-1))
    assert torch.allclose(*results, atol=1e-5)


def test_aliases_of_a_tensor_share_one_computation(tmp_path: Path, monkeypatch) -> None:
    """DeepSpeed's ZeRO-3 hands each module an alias; what is not taken must not stay."""
    model = build(saved(CONFIGS["llama"], tmp_path), METHODS["no dropout"], "auto")
    q, k, v, *_ = (
        m for n, m in model.named_modules() if ".layers.1." in n and isinstance(m, LoraLayer)
    )
    computed, original = list[int](), lora_linear._compute
    monkeypatch.setattr(
        lora_linear, "_compute", lambda m, x: computed.append(len(m)) or original(m, x)
    )
    x = torch.randn(1, 4, 64)
    q(x.view_as(x)), k(x.view_as(x)), v(x.view_as(x))
    assert computed == [3]
    q(x.view_as(x))
    x.add_(1.0)
    left = [weakref.ref(result) for result in q.forward._group._waiting.values()]
    k(x.view_as(x)), v(x.view_as(x))
    assert computed == [3, 3, 1, 1]
    assert [ref() for ref in left] == [None, None]


def test_sequence_without_targets_gives_zero_loss_with_a_graph(tmp_path: Path) -> None:
    model = build(saved(CONFIGS["llama"], tmp_path), METHODS["no dropout"], "auto")
    none = torch.zeros(0, dtype=torch.int64)
    token = torch.zeros(1, 1, dtype=torch.int64)
    nothing = MicroBatch(token, token, none, none, [1], [0], [1])
    target_losses(model, nothing)[0].backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("method", ["no dropout", "full"])
def test_per_target_losses(method: str, tmp_path: Path, monkeypatch) -> None:
    folder = saved(CONFIGS["llama-biased"], tmp_path)
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda vocabulary: 3)
    fast, plain = (build(folder, METHODS[method], k) for k in ("auto", "off"))
    (total, losses), (_, expected_value) = (target_losses(m, batch()) for m in (fast, plain))
    assert losses.shape == expected_value.shape == batch().targets.shape
    assert torch.allclose(losses, expected_value, atol=1e-5)
    assert total.item() == pytest.approx(losses.sum().item())
    assert not losses.requires_grad and not expected_value.requires_grad
