"""Uniform noise on the embeddings of a training step (NEFTune, arXiv:2310.05914).

As with dropout, the noise of a token is a function of (seed, step, sequence, position) alone. The
paper scales it by the length of the example, which here is the document, not the packed sequence.

Letters: T tokens of a micro-batch, n of a document, h width.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.distributed.tensor_utils import send
from dtrain.models.attention import known_document_lengths
from dtrain.models.dropout import DropoutKey, KeyedModule, shared_key


class EmbeddingNoise(KeyedModule):
    """Adds noise between -s and s to the embeddings of a document, s = alpha / sqrt(n h).

    Args:
        key: shared with the model's other keyed modules.
    """

    def __init__(self, alpha: float, key: DropoutKey) -> None:
        super().__init__()
        self.alpha, self.key = alpha, key

    def forward(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings [1, T, h] of tokens [1, T], with noise if the forward pass trains.

        A pass without a gradient is a reference, a baseline or an evaluation. An empty
        micro-batch, whose two tokens count nowhere, has no sequences.
        """
        if not (self.training and torch.is_grad_enabled() and self.key.lengths):
            return embeddings
        noise = torch.empty(embeddings.shape, dtype=torch.float32, device=embeddings.device)
        parts = noise[0].split(self.key.lengths)
        for sequence, part in zip(self.key.sequences, parts, strict=True):
            generator = torch.Generator(part.device)
            generator.manual_seed(self.key.number(sequence, "embedding noise"))
            part.uniform_(-1.0, 1.0, generator=generator)
        return embeddings + noise.mul_(self._scale(tokens, noise)).to(embeddings.dtype)

    def _scale(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """The scale of each token's noise, [T, 1]."""
        lengths = known_document_lengths(tokens)
        assert lengths, "the lengths of the documents are not those of the tokens"
        scales = [self.alpha / sqrt(length * noise.shape[-1]) for length in lengths]
        by_token = torch.tensor(scales).repeat_interleave(torch.tensor(lengths))
        return send(by_token, noise.device).unsqueeze(1)

    def extra_repr(self) -> str:
        """The argument, for the model's representation."""
        return f"alpha={self.alpha}"


def add_embedding_noise(model: nn.Module, alpha: float) -> None:
    """Let a model's input embeddings add noise in training."""
    base = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    embeddings = base.get_input_embeddings()
    embeddings.noise = EmbeddingNoise(alpha, shared_key(model))
    embeddings.register_forward_hook(_with_noise)


def _with_noise(embeddings: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return embeddings.noise(output, inputs[0])  # type: ignore[operator]
