"""Prompt tuning (arXiv:2104.08691), P-tuning (arXiv:2103.10385), prefix tuning (arXiv:2101.00190).

The first output is not the base's: virtual tokens change it. With the adapter off it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import PromptSettings
from dtrain.core.errors import UserError
from dtrain.methods.added import AddedMethod
from dtrain.models import attention
from dtrain.models.positions import NEAR
from dtrain.models.prompts import PromptedModel, PromptEmbedding, PromptMlp

EMBEDDING = "prompt_encoder.embedding.weight"
SAVED = "prompt_embeddings"  # PEFT's key


class PromptTuning(AddedMethod[PromptSettings]):
    """Embeddings of virtual tokens, drawn like those of a new model."""

    peft_type = "PROMPT_TUNING"

    def attach(
        self, model: PreTrainedModel, *, seed: int, device: torch.device | None = None
    ) -> nn.Module:
        check_token_tables(model)
        self._std = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
        prompted = self.prompted(model)
        self.initialize_all(prompted, seed, device or model.device)
        prompted.train()
        return prompted

    def prompted(self, model: PreTrainedModel) -> PromptedModel:
        """The model that reads the virtual tokens."""
        encoder = PromptEmbedding(self.settings.virtual_tokens, embedding_width(model))
        return PromptedModel(model, encoder)

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(std=self._std, generator=generator)

    def saved_tensors(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {SAVED: tensors[EMBEDDING]}

    def saved_config(self, model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, PromptedModel)
        config = model.config.get_text_config()
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.settings.virtual_tokens,
            "num_transformer_submodules": 1,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "token_dim": embedding_width(model.base_model),
        }


class PTuning(PromptTuning):
    """Embeddings that an MLP computes; what it computes at the end is saved, without the MLP."""

    peft_type = "P_TUNING"

    def prompted(self, model: PreTrainedModel) -> PromptedModel:
        encoder = PromptMlp(self.settings.virtual_tokens, embedding_width(model))
        return PromptedModel(model, encoder)

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name == EMBEDDING:  # as in PEFT
            tensor.normal_(generator=generator)
        elif tensor.dim() == 2:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)

    def saved_tensors(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        virtual_tokens, width = tensors[EMBEDDING].shape
        encoder = PromptMlp(virtual_tokens, width)
        encoder.load_state_dict(
            {name.removeprefix("prompt_encoder."): tensor for name, tensor in tensors.items()}
        )
        with torch.no_grad():
            return {SAVED: encoder()}


class PrefixTuning(PromptTuning):
    """Keys and values of virtual tokens in every layer."""

    peft_type = "PREFIX_TUNING"

    def prompted(self, model: PreTrainedModel) -> PromptedModel:
        layers, heads, size = shape = prefix_shape(model)
        model.set_attn_implementation(attention.NAME)  # others take no prefix
        encoder = PromptEmbedding(self.settings.virtual_tokens, layers * 2 * heads * size)
        return PromptedModel(model, encoder, shape)

    def saved_config(self, model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, PromptedModel)
        _, heads, size = prefix_shape(model.base_model)
        sizes = {"num_attention_heads": heads, "token_dim": heads * size}
        return super().saved_config(model) | sizes


def check_token_tables(model: PreTrainedModel) -> None:
    """Check that a model reads its tokens through its input embeddings alone.

    Raises:
        UserError: it has another table of about as many rows, which a virtual token is not in.
    """
    inputs: Any = model.get_input_embeddings()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module is inputs:
            continue
        rows = module.num_embeddings
        if 2 * rows > inputs.weight.shape[0] and abs(rows - positions) > NEAR:
            message = f"this model looks up tokens in {name} too, where virtual ones have no row"
            raise UserError(message, where="method.kind", fix="method.kind=lora")


def embedding_width(model: PreTrainedModel) -> int:
    """The width of the embeddings, whose weight may be in parts on other ranks."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.embedding_dim)


def prefix_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Number of layers, of key/value heads, and the size of a head.

    Raises:
        UserError: nothing can be put in front of this model's keys.
    """
    config: Any = model.config.get_text_config()
    indices = {getattr(module, "layer_idx", None) for module in model.modules()} - {None}
    fix = "method.kind=prompt, or p_tuning"
    if indices != set(range(config.num_hidden_layers)):
        raise UserError("the layers of this model take no prefix", where="method.kind", fix=fix)
    if not (model._supports_sdpa and model._supports_attention_backend):
        raise UserError("the attention of this model takes no prefix", where="method.kind", fix=fix)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size
