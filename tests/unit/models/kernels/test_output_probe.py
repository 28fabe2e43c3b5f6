"""A model's own forward says what it does around its output layer."""

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

from dtrain.models.kernels.fused_cross_entropy import head_loss
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
def test_plain_heads_are_exact_whatever_else_a_model_reports(name: str) -> None:
    found = of_config(SAME[name])
    assert found.exact and found.adjust is None


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not(name: str) -> None:
    assert not of_config(OTHERS[name]).exact


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("name", ADJUSTED)
def test_adjusted_logits_get_the_loss_and_gradient_of_the_models_own(
    name: str, learns: bool
) -> None:
    found = of_config(ADJUSTED[name])
    assert found.exact and found.adjust is not None
    hidden, weight, targets = torch.randn(9, 32), torch.randn(48, 32), torch.arange(9)
    hidden, weight = hidden.requires_grad_(learns), weight.requires_grad_(learns)
    loss, losses = head_loss(hidden, weight, None, targets, found.adjust)
    wanted = cross_entropy(found.adjust(linear(hidden, weight)), targets, reduction="none")
    torch.testing.assert_close(losses, wanted.detach())
    torch.testing.assert_close(loss, wanted.sum())
    if learns:
        ours, plain = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, wanted.sum()))
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
def test_what_a_chunk_could_not_compute_is_not_exact(kind: type[Llama]) -> None:
    with torch.device("meta"):
        model: Any = kind(LlamaConfig(**SMALL))
    assert not probe(model).exact


def test_what_happens_while_learning_alone_is_seen() -> None:
    class ScalesWhileLearning(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if torch.is_grad_enabled():
                output.logits = output.logits * 1.5
            return output

    with torch.device("meta"):
        model: Any = ScalesWhileLearning(LlamaConfig(**SMALL))
    found = probe(model)
    assert not found.exact or found.adjust is not None
