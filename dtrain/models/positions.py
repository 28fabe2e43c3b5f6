"""How many positions a model has: asked of the model, not of a list.

A model of the same config, without storage for its weights, places a token at a position. Learned
positions and tables of fixed length raise where they end; rotary positions never do.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dtrain.models.outline import outline

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
