"""Rows of the embeddings and of the output matrix that train alone: PEFT's trainable tokens.

PEFT copies a matrix in every forward pass, to put the trained rows into it, and so gets a gradient
of its size. Here an embedding looks up new tokens in the trained rows; of the output matrix a copy
remains, and it has its layer's bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

MARK = ".token_adapter."  # in the names of such rows


def token_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers with rows that train alone, with their names in the model; tied ones each."""
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            yield name, module.token_adapter


def token_row_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are such rows."""
    return {name for name, _ in model.named_parameters() if MARK in name}


def prepare_token_rows(model: nn.Module) -> None:
    """Make the rows float32, and compute with them; those of an empty base stay empty."""
    for _, layer in token_layers(model):
        layer.trainable_tokens_original.clear()  # PEFT's copy, for undoing a merge in memory
        is_embedding = isinstance(layer.base_layer, nn.Embedding)
        layer.forward = partial(_embed if is_embedding else _project, layer)
        if layer.tied_adapter is None:  # else the rows are those of the embedding
            for name in layer.trainable_tokens_delta:
                _take_from_base(layer, name)


def fill_token_rows(block: nn.Module) -> None:
    """Copy the base's values into the rows of a block that have none yet."""
    for _, layer in token_layers(block):
        for name, rows in layer.trainable_tokens_delta.items():
            if rows.is_meta:
                _take_from_base(layer, name)


def _take_from_base(layer: Any, name: str) -> None:
    weight = layer.base_layer.weight.detach()
    rows = weight[layer.token_indices[name]].to(torch.float32, copy=True)
    layer.trainable_tokens_delta[name] = nn.Parameter(rows)


def _active(layer: Any) -> str | None:
    return None if layer.disable_adapters else next(iter(layer.active_adapters), None)


def _embed(layer: Any, ids: Tensor) -> Tensor:
    """The embeddings of token ids, as PEFT computes them."""
    states: Tensor = layer.base_layer(ids)
    if (name := _active(layer)) is None:
        return states
    found = ids.unsqueeze(-1) == torch.tensor(layer.token_indices[name], device=ids.device)
    rows = embedding(found.int().argmax(-1), layer.trainable_tokens_delta[name])
    rows = rows.to(layer.base_layer.weight.dtype)
    if (scale := layer._get_embed_scale()) is not None:
        rows = rows * scale.to(rows.dtype)
    return torch.where(found.any(-1, keepdim=True), rows.to(states.dtype), states)


def _project(layer: Any, states: Tensor) -> Tensor:
    return linear(states, output_weight(layer), layer.base_layer.bias)


def output_weight(layer: Any) -> Tensor:
    """The matrix [V, h] of an output layer, with the trained rows in it."""
    name = _active(layer)
    weight: Tensor = layer.base_layer.weight
    return weight if name is None else layer.get_merged_weights([name])
