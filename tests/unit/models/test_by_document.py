"""Layers with a state: a packed sequence has the losses and gradients of each document alone."""

from __future__ import annotations

import copy
import sys
import types
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import use_kernel_func_from_hub_with_fallback

from dtrain.config import schema
from dtrain.models import by_document
from dtrain.models.attention import use_document_lengths
from dtrain.models.by_document import has_state, missing_packages, separate_states
from dtrain.models.dropout import DropoutKey, KeyedDropout
from dtrain.models.load import freeze_for_training, silence_transformers
from dtrain.models.loss import target_logits
from dtrain.models.packing_probe import ProbeSequence

COMMON: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
# A gated delta net, a short convolution, Mamba-2 next to attention, Mamba alone, and lightning
# attention.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8},
    "mamba": {"state_size": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
}  # fmt: skip
PACKAGES = {
    "qwen3_5_text": ["causal-conv1d", "flash-linear-attention"],
    "lfm2": ["causal-conv1d"],
    "falcon_h1": ["causal-conv1d", "mamba-ssm"],
    "mamba": ["causal-conv1d", "mamba-ssm"],
    "minimax": [],
}
DOCUMENTS = [torch.arange(3, 17), torch.arange(40, 61), torch.arange(90, 95)]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**COMMON, **MODELS[request.param]})
    with silence_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def gradients(model: Any, sequences: list[ProbeSequence]) -> dict[str, Tensor]:
    """Gradients of a loss over all tokens; logits of all of them are in `logits`."""
    model.requires_grad_(True)
    logits = [target_logits(model, sequence) for sequence in sequences]
    torch.cat(logits).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": torch.cat(logits).detach()} | found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_documents_are_computed_as_alone(model: Any, checkpointing: bool) -> None:
    if checkpointing and not model.supports_gradient_checkpointing:
        pytest.skip("transformers cannot recompute its layers")
    settings = schema.Model(base="here", gradient_checkpointing=checkpointing)
    assert any(has_state(module) for module in model.modules())
    plain = copy.deepcopy(model)
    packed = gradients(freeze_for_training(model, settings), [ProbeSequence.of(DOCUMENTS)])
    alone = gradients(plain, [ProbeSequence.of([document]) for document in DOCUMENTS])
    assert packed.keys() == alone.keys()
    for name, values in alone.items():
        torch.testing.assert_close(packed[name], values, rtol=1e-4, atol=1e-4, msg=name)


def test_a_model_generates_after_a_training_step(model: Any) -> None:
    plain = copy.deepcopy(model)
    trained = freeze_for_training(model, schema.Model(base="here"))
    gradients(trained, [ProbeSequence.of(DOCUMENTS)])
    for tokens in (torch.arange(3, 43)[None], torch.tensor([[5, 6, 7], [9, 8, 7]])):
        expected, found = (
            m.eval().generate(tokens, max_new_tokens=3, do_sample=False, use_cache=True)
            for m in (plain, trained)
        )
        assert torch.equal(found, expected)


def test_documents_of_the_whole_sequence_do_not_reach_a_layer_with_a_state(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flash attention a model gets them, and passes them on to all of its layers."""
    sequence = ProbeSequence.of(DOCUMENTS)
    freeze_for_training(model, schema.Model(base="here"))
    expected = target_logits(model, sequence)
    boundaries = torch.tensor([0, 14, 35, 40], dtype=torch.int32)
    passed = dict(zip(by_document.BOUNDARIES, (boundaries, boundaries, 21, 21), strict=True))
    monkeypatch.setattr("dtrain.models.loss._flash_arguments", lambda *_: passed)
    assert torch.equal(target_logits(model, sequence), expected)


def test_packages_that_would_be_faster_are_named(model: Any) -> None:
    modules = {"flash-linear-attention": "fla"}
    missing = [
        package
        for package in PACKAGES[model.config.model_type]
        if find_spec(modules.get(package, package.replace("-", "_"))) is None
    ]
    freeze_for_training(model, schema.Model(base="here"))
    assert missing_packages(model) == missing


class Convolved(nn.Module):
    """A layer that calls a function which another package may replace."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=2, groups=4)
        self.out = nn.Linear(4, 4)
        self.function = function

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.function(hidden_states.transpose(1, 2), self.conv)
        return self.out(x[..., : hidden_states.shape[1]].transpose(1, 2))


def test_functions_of_gpu_packages_are_called_on_a_gpu_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    package = types.ModuleType("kernels_of_a_package")
    package.convolve = lambda x, layer: called.append(x.shape[-1]) or layer(x)  # type: ignore
    monkeypatch.setitem(sys.modules, package.__name__, package)

    @use_kernel_func_from_hub_with_fallback("convolve", package.__name__)
    def convolve(x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x)

    layer, x = Convolved(convolve), torch.randn(1, 7, 4)
    convolve(x.transpose(1, 2), layer.conv)
    separate_states(layer)
    expected = layer(x)
    assert not called, "a CPU computes with a GPU's function"
    monkeypatch.setattr(by_document, "_is_on_gpu", lambda tensor: True)
    assert torch.equal(layer(x), expected)
    assert called == [7]


class Averaging(nn.Module):
    """A running mean of hidden states, which `restart` takes documents apart for."""

    def __init__(self, restart: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=2, groups=4)  # has_state
        self.out = nn.Linear(4, 4)
        self.restart = restart
        self.calls: list[int] = []

    def forward(self, hidden_states: Tensor, **boundaries: Any) -> Tensor:
        self.calls.append(hidden_states.shape[1])
        rows = self.restart(hidden_states, boundaries.get("cu_seq_lens_q"))
        means = [r.cumsum(1) / torch.arange(1, r.shape[1] + 1)[:, None] for r in rows]
        return self.out(torch.cat(means, dim=1))


def honors(x: Tensor, ends: Tensor | None) -> Any:
    return [x] if ends is None else x.split(ends.diff().tolist(), dim=1)


def ignores(x: Tensor, ends: Tensor | None) -> Any:
    return [x]


def leaks_in_backward(x: Tensor, ends: Tensor | None) -> Any:
    parts = honors(x, ends)
    return [part + 1e-6 * (x.mean() - x.mean().detach()) for part in parts]


def fails(x: Tensor, ends: Tensor | None) -> Any:
    if ends is not None:
        raise ValueError("no package")
    return [x]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("restart", [honors, ignores, leaks_in_backward, fails])
def test_a_sequence_is_computed_whole_where_a_layer_separates_documents(
    restart: Any,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(by_document, "_is_on_gpu", lambda tensor: True)
    layer, lengths = Averaging(restart), (3, 7, 2)
    plain = copy.deepcopy(layer)
    separate_states(layer)
    x = torch.randn(1, 12, 4, requires_grad=True)
    with use_document_lengths(lengths):
        y = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
    asked = len(layer.calls) - (1 if restart is honors else len(lengths))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)  # recomputed: without known lengths
    whole = layer.calls[asked:] == [12] * (1 + checkpointing)
    assert whole == (restart is honors)
    said = capsys.readouterr().out
    assert said.count("Averaging computes") == 1
    assert ("whole" in said.split(":")[0]) == whole and ("no package" in said) == (restart is fails)
    alone = [plain(part) for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(y, torch.cat(alone, dim=1))
    (expected,) = torch.autograd.grad(sum(part.square().sum() for part in alone), x)
    torch.testing.assert_close(gradient, expected)
    assert all(p.grad is None for p in layer.parameters())


def test_memory_that_runs_out_does_not_decide_how_a_layer_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def restart(x: Tensor, ends: Tensor | None) -> Any:
        if ends is not None:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return [x]

    monkeypatch.setattr(by_document, "_is_on_gpu", lambda tensor: True)
    layer = Averaging(restart)
    separate_states(layer)
    with use_document_lengths((3, 9)), pytest.raises(RuntimeError, match="out of memory"):
        layer(torch.randn(1, 12, 4))


def test_a_layer_with_a_state_is_never_in_training_mode() -> None:
    """There mamba-ssm multiplies with the weights of linear layers without calling them."""
    layer = Convolved(lambda x, conv: conv(x))
    separate_states(layer)
    nn.Sequential(layer).train()
    assert not layer.training and layer.out.training
    layer.eval()
    assert not layer.out.training


def test_dropout_of_an_adapter_is_that_of_the_whole_sequence() -> None:
    key = DropoutKey(seed=1, step=2, sequences=[7, 9], lengths=[30, 10])
    dropout = KeyedDropout(0.5, "layer", key).train()
    x = torch.ones(1, 40, 8)
    whole = dropout(x)
    parts = []
    for start, stop in ((0, 14), (14, 35), (35, 40)):
        key.part = slice(start, stop)
        parts.append(dropout(x[:, start:stop]))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    key.part = None
    assert torch.equal(dropout(x), whole)
