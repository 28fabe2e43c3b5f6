"""What a model passes to its attention, recorded on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from dtrain.models.attention import Documents

PROBE = "probe of arguments"  # name of an attention that records what it gets


@dataclass
class PassedArguments:
    """What a model passes to its attention.

    Attributes:
        names: of tensors that `document_attention` may know nothing of, or cannot do without: all
            but queries, keys, values, a mask and positions.
        largest_head: size of a query's head in the layer where it is largest.
    """

    names: set[str] = field(default_factory=set)
    largest_head: int = 0


_recorded: ContextVar[PassedArguments] = ContextVar("recorded")


@contextmanager
def recording_arguments() -> Iterator[PassedArguments]:
    """Collect what a model passes to the attention PROBE."""
    passed = PassedArguments()
    token = _recorded.set(passed)
    try:
        yield passed
    finally:
        _recorded.reset(token)


def _record_arguments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention without values: [1, H, T, D] → [1, T, H, D of the values]."""
    names = {name for name, argument in kwargs.items() if isinstance(argument, Tensor)}
    if key.shape[2] != query.shape[2]:  # it adds keys of its own
        names.add("key")
    passed = _recorded.get()
    passed.names |= names - {"position_ids", "cache_position"}
    passed.largest_head = max(passed.largest_head, query.shape[-1])
    return query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[-1]), None


class _MetaDocuments(Documents):
    """The documents of a sequence on the meta device."""

    def __getitem__(self, index: Any) -> Tensor:
        tokens = sum(self.lengths)
        return torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device="meta")[index]


def _meta_mask(q_length: int, **_: Any) -> Documents:
    return _MetaDocuments((q_length,), None)


AttentionInterface.register(PROBE, _record_arguments)
AttentionMaskInterface.register(PROBE, _meta_mask)
