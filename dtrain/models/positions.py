"""Rotary embeddings per document, and how many positions a model has.

transformers' longrope and dynamic NTK choose their frequencies by the longest document of a packed
sequence, dynamic NTK also by earlier sequences, so a document would be computed differently next to
a longer one. Letters: T tokens of a sequence, D rotated dimensions of a head.
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

from dtrain.models.attention import known_document_lengths
from dtrain.models.meta_model import build_meta_model

LENGTH_DEPENDENT = ("dynamic", "longrope")
NEAR = 16  # a position table may be this much shorter than its config says, for padding


def rotate_by_document(model: nn.Module) -> None:
    """Compute length-dependent rotary embeddings for each document by itself."""
    for module in model.modules():
        if is_length_dependent(module):
            module.forward = partial(_by_document, module, module.forward)


def is_length_dependent(module: nn.Module) -> bool:
    """Whether a rotary embedding recomputes its frequencies in the forward pass."""
    kinds = getattr(module, "rope_type", None)  # in some models a dict by layer type
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(name in str(kind) for kind in kinds for name in LENGTH_DEPENDENT)


def document_lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each document of a packed sequence; T if it is not packed.

    Args:
        position_ids: [1, T]; with several sequences or axes it is not packed.
    """
    tokens = position_ids.shape[-1]
    if (known := known_document_lengths(position_ids)) is not None:
        return list(known)
    if position_ids.shape[:-1] != (1,):
        return [tokens]
    starts = ((position_ids[0, 1:] == 0).nonzero()[:, 0] + 1).tolist()
    return [stop - start for start, stop in pairwise([0, *starts, tokens])]


def _by_document(
    module: nn.Module, forward: Callable[..., Any], x: Tensor, position_ids: Tensor, *rest: Any,
    **more: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Cosines and sines, [1, T, D] each; documents of equal length share them."""
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
    """Reset the longest sequence so far, which dynamic NTK stores."""
    longest = "max_seq_len_cached"
    for name in [n for n in vars(module) if n.endswith(longest)]:
        setattr(module, name, module.original_max_seq_len)
    for name in [n for n in module._buffers if n.endswith("original_inv_freq")]:
        buffer, original = name.replace("original_", ""), module.get_buffer(name)
        setattr(module, buffer, original.clone())  # longrope writes into it


def position_limit(
    config: PretrainedConfig, longest: int, trust_remote_code: bool = False
) -> int | None:
    """The number of positions of a model that has fewer than `longest`.

    Args:
        config: from `read_config`; not changed.
        longest: tokens of the longest document.

    Returns:
        None if the model can compute such a document, or its code fails at any length.
    """
    configured = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(configured, int) and longest + NEAR <= configured:
        return None
    with torch.no_grad():
        try:
            model = _with_zeros(build_meta_model(config, trust_remote_code, attention=None))
        except Exception:  # a model's code may raise anything; training reports it
            return None
        if _has_position(model, longest) or not _has_position(model, 1):
            return None
        configured = configured if isinstance(configured, int) else longest
        if configured < longest and _is_limit(model, configured):
            return configured  # the usual case, without a search
        return bisect_left(range(longest), True, key=lambda n: not _has_position(model, n + 1))


def _is_limit(model: PreTrainedModel, count: int) -> bool:
    return _has_position(model, count) and not _has_position(model, count + 1)


def _has_position(model: PreTrainedModel, count: int) -> bool:
    """Whether a model can compute the token at position `count - 1`."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    ids = torch.zeros((1, 1 if takes_positions else count), dtype=torch.int64)
    positions = {"position_ids": torch.tensor([[count - 1]])} if takes_positions else {}
    try:
        model(input_ids=ids, use_cache=False, **positions)
    except Exception:  # an index or shape error, or the model's own
        return False
    return True


def _with_zeros(outlined: PreTrainedModel) -> PreTrainedModel:
    """The model without its head, all of whose tensors are views of a single zero."""
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
