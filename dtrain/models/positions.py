"""Rotary frequencies that depend on a document's length, taken from each document of a row.

transformers' longrope and dynamic NTK take them from the longest document of the row, dynamic NTK
also from the rows before it: a document would be computed differently next to a longer one.
Letters: T tokens of a row, D rotated dimensions of a head.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dtrain.models.attention import known_lengths
from dtrain.models.outline import outline

LENGTH_DEPENDENT = ("dynamic", "longrope")


def rotate_by_document(model: nn.Module) -> None:
    """Make each rotary embedding with length-dependent frequencies compute documents alone."""
    for module in model.modules():
        if is_length_dependent(module):
            module.forward = partial(_by_document, module, module.forward)


def is_length_dependent(module: nn.Module) -> bool:
    """Whether a rotary embedding recomputes its frequencies in the forward pass."""
    kinds = getattr(module, "rope_type", None)  # of each kind of layer, in some models
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(name in str(kind) for kind in kinds for name in LENGTH_DEPENDENT)


def document_lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each document of a packed row; of the whole where it is no packed row.

    Args:
        position_ids: [1, T]; of several rows or axes it is no packed row.
    """
    tokens = position_ids.shape[-1]
    if (known := known_lengths(position_ids)) is not None:
        return list(known)
    if position_ids.shape[:-1] != (1,):
        return [tokens]
    starts = ((position_ids[0, 1:] == 0).nonzero()[:, 0] + 1).tolist()
    return [stop - start for start, stop in pairwise([0, *starts, tokens])]


def _by_document(
    module: nn.Module, forward: Callable[..., Any], x: Tensor, position_ids: Tensor, *rest: Any,
    **more: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Cosines and sines, [1, T, D] each; documents of one length share them."""
    lengths = document_lengths(position_ids)
    by_length: dict[int, tuple[Tensor, ...]] = {}
    for start, length in zip(accumulate([0, *lengths]), lengths, strict=False):
        if length not in by_length:
            _reset(module)
            positions = position_ids[..., start : start + length]
            by_length[length] = forward(x, positions, *rest, **more)
    rotations = [by_length[length] for length in lengths]
    if len(rotations) == 1:
        return rotations[0]
    return tuple(torch.cat(parts, dim=1) for parts in zip(*rotations, strict=True))


def _reset(module: nn.Module) -> None:
    """Forget the longest row so far, which dynamic NTK keeps."""
    longest = "max_seq_len_cached"
    for name in [n for n in vars(module) if n.endswith(longest)]:
        setattr(module, name, module.original_max_seq_len)
    for name in [n for n in module._buffers if n.endswith("original_inv_freq")]:
        buffer, original = name.replace("original_", ""), module.get_buffer(name)
        setattr(module, buffer, original.clone())  # longrope writes into it


NEAR = 16  # positions that a table may lack of those that its config names, for padding


def position_limit(
    config: PretrainedConfig, longest: int, trust_remote_code: bool = False
) -> int | None:
    """Positions of a model that has fewer than `longest`.

    Args:
        config: from `read_config`; not changed.
        longest: tokens of a document.

    Returns:
        None if a document of that length can be placed, or the model's code fails at any length.
    """
    named = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(named, int) and longest + NEAR <= named:
        return None
    with torch.no_grad():
        try:
            model = _with_zeros(outline(config, trust_remote_code, attention=None))
        except Exception:  # whatever a model's code raises; training says it
            return None
        if _places(model, longest) or not _places(model, 1):
            return None
        named = named if isinstance(named, int) else longest
        if named < longest and _places(model, named) and not _places(model, named + 1):
            return named  # the usual case, without a search
        return bisect_left(range(longest), True, key=lambda last: not _places(model, last + 1))


def _places(model: PreTrainedModel, count: int) -> bool:
    """Whether a model computes the last of so many tokens."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    ids = torch.zeros((1, 1 if takes_positions else count), dtype=torch.int64)
    positions = {"position_ids": torch.tensor([[count - 1]])} if takes_positions else {}
    try:
        model(input_ids=ids, use_cache=False, **positions)
    except Exception:  # of an index, of a shape, or of the model's own
        return False
    return True


def _with_zeros(outlined: PreTrainedModel) -> PreTrainedModel:
    """The model without its head, able to compute: each tensor is views of one zero."""
    model = outlined.base_model
    assert isinstance(model, PreTrainedModel)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _Zeros(child.out_features))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_zeros(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _zeros(buffer)
    return model.eval()


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


class _Zeros(nn.Module):
    """A linear layer whose output is zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)
