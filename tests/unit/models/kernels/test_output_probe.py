"""The probe detects what a model's forward computes around its output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from dtrain.models.kernels.fused_cross_entropy import fused_cross_entropy
from dtrain.models.kernels.output_probe import OutputProbe

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
SAME = {"qwen3": Qwen3Config(**SMALL), "mixtral": MixtralConfig(**SMALL)}
ADJUSTED = {
    "gemma2": Gemma2Config(**SMALL, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
}
OTHERS = {"bert": BertConfig(is_decoder=True), "minicpm3": MiniCPM3Config()}  # scales its states


def probe(model: Any) -> OutputProbe:
    return OutputProbe(model, model.get_output_embeddings())


def of_config(config: PretrainedConfig) -> OutputProbe:
    with torch.device("meta"):
        return probe(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("name", SAME)
def test_plain_heads_are_exact_with_any_other_output(name: str) -> None:
    probe = of_config(SAME[name])
    assert probe.exact and probe.transform is None


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_are_not_exact(name: str) -> None:
    assert not of_config(OTHERS[name]).exact


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("name", ADJUSTED)
def test_transformed_logits_give_the_models_loss_and_gradient(
    name: str, needs_gradient: bool
) -> None:
    probe = of_config(ADJUSTED[name])
    assert probe.exact and probe.transform is not None
    hidden, weight, targets = torch.randn(9, 32), torch.randn(48, 32), torch.arange(9)
    hidden, weight = hidden.requires_grad_(needs_gradient), weight.requires_grad_(needs_gradient)
    loss, losses = fused_cross_entropy(hidden, weight, None, targets, probe.transform)
    expected = cross_entropy(probe.transform(linear(hidden, weight)), targets, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(loss, expected.sum())
    if needs_gradient:
        ours, plain = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected.sum()))
        torch.testing.assert_close(ours, plain)


class Llama(LlamaForCausalLM):  # type: ignore[misc]
    """A model whose forward changes Llama's logits."""

    def forward(  # type: ignore[override]
        self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any
    ) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = self.changed(output.logits)
        return output

    def changed(self, logits: Tensor) -> Tensor:
        raise NotImplementedError


class WritesInPlace(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return logits.mul_(2.0)


class MixesRows(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(1, keepdim=True)


class DropsInTraining(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return torch.nn.functional.dropout(logits, 0.5, self.training)


class UsesWeights(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return logits + self.model.norm.weight.sum()


class CutsTheVocabulary(Llama):
    def changed(self, logits: Tensor) -> Tensor:
        return logits[..., :16]


class KeepsOthers(Llama):
    def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:  # type: ignore[override]
        return LlamaForCausalLM.forward(self, *args, logits_to_keep=2, **kwargs)


@pytest.mark.parametrize("kind", Llama.__subclasses__())
def test_transform_across_tokens_is_not_exact(kind: type[Llama]) -> None:
    with torch.device("meta"):
        model: Any = kind(LlamaConfig(**SMALL))
    assert not probe(model).exact


def test_transform_only_in_training_is_detected() -> None:
    class ScalesWhileLearning(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if torch.is_grad_enabled():
                output.logits = output.logits * 1.5
            return output

    with torch.device("meta"):
        model: Any = ScalesWhileLearning(LlamaConfig(**SMALL))
    result = probe(model)
    assert not result.exact or result.transform is not None
