"""Virtual tokens in front of every document of a packed sequence.

Letters: T tokens of a sequence, d documents, v virtual tokens, K targets, h hidden size, L layers,
H key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.distributed.tensor_utils import send
from dtrain.models.attention import (
    Documents,
    Prefix,
    known_document_lengths,
    use_document_lengths,
)


class PromptEmbedding(nn.Module):
    """Trained embeddings [v, h] (arXiv:2104.08691)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)

    def forward(self) -> Tensor:
        """The virtual tokens [v, h]."""
        return self.embedding.weight


class PromptMlp(PromptEmbedding):
    """Embeddings through an MLP (arXiv:2103.10385), as PEFT's PromptEncoder."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width)
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers, nn.Linear(width, width))

    def forward(self) -> Tensor:
        """The virtual tokens [v, h]."""
        result: Tensor = self.mlp_head(self.embedding.weight)
        return result


class PromptedModel(nn.Module, BaseTunerLayer):
    """A model that reads v virtual tokens before each document, and answers for the real ones.

    Args:
        base_model: frozen.
        encoder: returns the embeddings [v, h]; or for a prefix, keys and values [v, L·2·H·D] in
            PEFT's order.
        prefix_shape: L, H and D of a prefix; None for embeddings.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        encoder: PromptEmbedding,
        prefix_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.base_model, self.prompt_encoder = base_model, encoder
        self._prefix_shape = prefix_shape
        self.config = base_model.config
        self._disable_adapters = False
        self._takes_positions = "logits_to_keep" in signature(base_model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | int = 0,
        **more: Any,
    ) -> Any:
        """The base's output for the tokens of `input_ids` [1, T].

        Args:
            position_ids: [1, T], restarting in each document; None: one document.
            logits_to_keep: [K] tokens whose logits are wanted; 0: all.
        """
        if self._disable_adapters:
            kept = {"logits_to_keep": logits_to_keep} if self._takes_positions else {}
            return self.base_model(input_ids=input_ids, position_ids=position_ids, **kept, **more)
        tokens, device = input_ids.shape[1], input_ids.device
        known = known_document_lengths(input_ids)
        assert known or position_ids is None, "call use_document_lengths first"
        lengths = known or (tokens,)
        prompt = self.prompt_encoder()
        longer = [length + len(prompt) for length in lengths]
        real = _real_tokens(lengths, len(prompt), device)
        wanted = real[logits_to_keep] if isinstance(logits_to_keep, Tensor) else real
        if position_ids is not None:
            positions = torch.cat([torch.arange(length) for length in longer])
            more["position_ids"] = send(positions, device).unsqueeze(0)
        if "cu_seq_lens_q" in more:
            more |= Documents(tuple(longer), None).flash_arguments(device)
        if self._takes_positions:
            more["logits_to_keep"] = wanted
        prefix = self._prefix(prompt, longer)
        embedded = self._embed(input_ids, prompt, lengths, is_prefix=prefix is not None)
        with use_document_lengths(longer, prefix):
            output = self.base_model(inputs_embeds=embedded, **more)
        if not self._takes_positions:
            output.logits = output.logits[:, wanted]
        return output

    def _prefix(self, prompt: Tensor, lengths: Sequence[int]) -> Prefix | None:
        """The keys and values of a prefix, at the first v tokens of each document."""
        if self._prefix_shape is None:
            return None
        layers, heads, size = self._prefix_shape
        starts = accumulate(lengths[:-1], initial=0)
        positions = torch.cat([torch.arange(start, start + len(prompt)) for start in starts])
        states = prompt.view(len(prompt), layers, 2, heads, size).permute(1, 2, 3, 0, 4)
        return Prefix(states, send(positions, prompt.device))

    def _embed(
        self, input_ids: Tensor, prompt: Tensor, lengths: Sequence[int], *, is_prefix: bool
    ) -> Tensor:
        """Embeddings [1, T + d·v]; zero where a prefix replaces keys and values."""
        embedded: Tensor = self.base_model.get_input_embeddings()(input_ids)[0]
        shape = len(prompt), embedded.shape[-1]
        first = embedded.new_zeros(shape) if is_prefix else prompt.to(embedded.dtype)
        parts = [part for document in embedded.split(lengths) for part in (first, document)]
        return torch.cat(parts).unsqueeze(0)


def _real_tokens(lengths: Sequence[int], virtual: int, device: torch.device) -> Tensor:
    """Where the tokens of each document are behind its virtual ones: int64 [T]."""
    starts = accumulate((length + virtual for length in lengths[:-1]), initial=virtual)
    positions = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    return send(torch.cat(positions), device)
