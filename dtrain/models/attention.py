"""Attention over packed rows, one document at a time.

A row [1, T] holds documents end to end, told apart by position ids that restart. transformers'
own sdpa keeps them apart by a T x T mask: it computes every pair and throws most away. The
implementation "documents" registered here computes each document's causal square and nothing
else: no mask, no wasted pair, the same numbers.

Letters: T tokens of a row, n of a document, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dtrain.core.log import warn
from dtrain.distributed.memory import send
from dtrain.models.kernels.causal_attention import causal_attention, fits

NAME = "documents"
# What FlashAttention-2 was written for, where torch brings it along.
VARLEN_CAPABILITY, VARLEN_HEAD_SIZE = (8, 0), 256


@dataclass(frozen=True)
class Documents:
    """What stands in the mask's place, found once a forward pass.

    A class that no wrapper looks into: engines rebuild tuples that pass through them.

    Attributes:
        lengths: tokens of each document of the row.
        window: a token sees itself and the ones before it, this many in all; None: all of them.
    """

    lengths: tuple[int, ...]
    window: int | None
    _borders: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def borders(self, device: torch.device) -> Tensor:
        """Where documents begin, and where the last one ends: int32 [documents + 1].

        Copied once for all layers, masks and recomputations of a forward pass.
        """
        if device not in self._borders:
            ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
            self._borders[device] = send(ends, device)
        return self._borders[device]

    def __getitem__(self, places: Any) -> Tensor:
        """A part of the mask that sdpa takes in its place, bool [1, 1, T, T], on the CPU.

        Gemma 4 cuts queries out of it whose logits nobody asked for.
        """
        document = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        seen = (document[:, None] == document).tril()
        if self.window is not None:
            seen = seen.triu(1 - self.window)
        return seen[None, None][places]


_row: ContextVar[Documents | None] = ContextVar("row", default=None)


@contextmanager
def row_of(lengths: Sequence[int]) -> Iterator[None]:
    """Make the masks of the forward pass inside from what the caller knows of its row.

    Without it transformers and `find_documents` ask the device, and wait for the answer.

    Args:
        lengths: tokens of each document of the row.
    """
    token = _row.set(Documents(tuple(lengths), None))
    try:
        yield
    finally:
        _row.reset(token)


def known_lengths(position_ids: Tensor) -> tuple[int, ...] | None:
    """Tokens of each document, where the caller of the model said what its row [1, T] holds."""
    row = _row.get()
    known = row is not None and position_ids.shape == (1, sum(row.lengths))
    return row.lengths if row is not None and known else None


def _sequence_numbers(position_ids: Tensor) -> Tensor | None:
    """In place of transformers' `find_packed_sequence_indices`, without its question."""
    row = _row.get()
    if row is None or known_lengths(position_ids) is None:
        return _transformers_sequence_numbers(position_ids)
    if len(row.lengths) == 1:
        return None
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    inner_borders = row.borders(position_ids.device)[1:-1]
    return torch.bucketize(places, inner_borders, right=True).unsqueeze(0)


def _packed_mask_function(
    mask_function: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Callable[..., Tensor]:
    """As transformers' own, and says which mask it puts into each document."""
    assert _transformers_packed_mask_function is not None
    result = _transformers_packed_mask_function(mask_function, *args, **kwargs)
    result.inside = mask_function  # type: ignore[attr-defined]
    return result


_transformers_sequence_numbers = masking_utils.find_packed_sequence_indices
_transformers_packed_mask_function: Callable[..., Callable[..., Tensor]] | None = getattr(
    masking_utils, "packed_sequence_compatibility_function", None
)
masking_utils.find_packed_sequence_indices = _sequence_numbers
if _transformers_packed_mask_function is not None:  # older versions: `find_documents` asks
    masking_utils.packed_sequence_compatibility_function = _packed_mask_function


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | Documents | None:
    """Called by transformers where it would build a mask.

    A packed row, and nothing else, gives documents. Padding, a key/value cache, several rows or
    a mask of the model's own making (generation, other people's calls) give sdpa's usual mask.
    """
    if batch_size == 1 and q_length == kv_length and attention_mask is None and not use_vmap:
        documents = _documents_of_row(mask_function, q_length)
        documents = documents or find_documents(mask_function, q_length, device)
        if documents is not None:
            return documents
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
        attention_mask=attention_mask, use_vmap=use_vmap, device=device, **kwargs,
    )  # fmt: skip


def _documents_of_row(mask_function: Callable[..., Tensor], tokens: int) -> Documents | None:
    """Read the window off a mask function, where the row is known; None if that does not do.

    The mask inside a document knows positions alone, so that the host can ask it.
    """
    row = _row.get()
    if row is None or sum(row.lengths) != tokens:
        return None
    alone = mask_function if len(row.lengths) == 1 else None
    inside = getattr(mask_function, "inside", alone)
    longest = max(row.lengths)
    try:
        found = find_documents(inside, longest, "cpu") if inside is not None else None
    except RuntimeError:  # it holds tensors of a device
        return None
    if found is None or found.lengths != (longest,):
        return None
    return replace(row, window=found.window)


def find_documents(
    mask_function: Callable[..., Tensor], tokens: int, device: torch.device | str
) -> Documents | None:
    """Read lengths and window off a mask function in O(T); None if a token sees a later one.

    Args:
        mask_function: (batch, head, query position, key position) → whether it is seen.
    """

    def sees(query: Tensor, key: Tensor) -> Tensor:
        zero = torch.zeros_like(key)
        seen = mask_function(zero, zero, query, key)
        return torch.as_tensor(seen, device=device).expand_as(key)

    later = torch.arange(1, tokens, device=device)
    if sees(later - 1, later).any():
        return None
    starts = [0, *later[~sees(later, later - 1)].tolist(), tokens]
    lengths = tuple(b - a for a, b in pairwise(starts))
    longest = max(lengths)
    stop = starts[lengths.index(longest)] + longest
    keys = torch.arange(stop - longest, stop, device=device)
    window = int(sees(torch.full_like(keys, stop - 1), keys).sum())
    return Documents(lengths, window if window < longest else None)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Documents | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document.

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D]; H is a multiple of K.
        attention_mask: what document_mask gave.

    Returns:
        [1, T, H, D], and no attention weights.
    """
    if not isinstance(attention_mask, Documents):
        mask = None if attention_mask is None else attention_mask.to(query.device)
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    lengths, window = attention_mask.lengths, attention_mask.window
    if window is None and dropout == 0.0 and fits(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, lengths, scale), None
    if dropout == 0.0 and takes_varlen(query, value):
        return varlen_attention(query, key, value, attention_mask, scaling), None
    # split, not slices: a slice's gradient is a zero tensor as large as the row, one a document.
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = [
        _one_document(q, k, v, dropout, scaling, window) for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def takes_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's flash attention for rows of documents takes such tensors, by its papers."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= VARLEN_HEAD_SIZE
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= VARLEN_CAPABILITY
        and torch_varlen() is not None
    )


@cache
def torch_varlen() -> Callable[..., Any] | None:
    """Torch's own, where it has the form called here; otherwise a warning, once.

    Looked for when a GPU asks, because what it imports is for GPUs.
    """
    try:
        found: Callable[..., Any] = import_module("torch.nn.attention.varlen").varlen_attn
        if {"scale", "window_size"} <= signature(found).parameters.keys():
            return found
    except (ImportError, AttributeError):
        pass
    warn("attention: torch's varlen_attn takes no scale or window here; documents one by one")
    return None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None
) -> Tensor:
    """All documents of a row in one call of torch's own flash attention; never run here.

    Args:
        query, key, value: as for `document_attention`.

    Returns:
        [1, T, H, D].
    """
    attend = torch_varlen()
    assert attend is not None, "ask takes_varlen first"
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    more: dict[str, Any] = {}
    if (groups := q.shape[1] // k.shape[1]) > 1:
        if "enable_gqa" in signature(attend).parameters:
            more["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    borders, longest = documents.borders(query.device), max(documents.lengths)
    before = -1 if documents.window is None else documents.window - 1
    output: Tensor = attend(
        q, k, v, borders, borders, longest, longest, scale=scale, window_size=(before, 0), **more
    )
    return output.unsqueeze(0)


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """[1, H, n, D], [1, K, n, D] twice → [1, n, H, D]."""
    tokens = query.shape[2]
    mask = None
    if window is not None and tokens > window:
        square = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
        mask = square.tril() & square.triu(1 - window)
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, document_mask)
