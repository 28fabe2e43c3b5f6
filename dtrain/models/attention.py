"""Attention over packed sequences, one document at a time.

A packed sequence [1, T] holds documents one after the other; position ids restart at each.
transformers' sdpa separates them by a T x T mask: it computes every pair and discards most. The
implementation "documents", registered here, computes only each document's causal square, without a
mask and with the same results.

Letters: T tokens of a sequence, n of a document, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dtrain.core.errors import UserError
from dtrain.distributed.tensor_utils import send
from dtrain.models.kernels import varlen
from dtrain.models.kernels.causal_attention import causal_attention, supports_causal_attention

NAME = "documents"


@dataclass(frozen=True)
class Prefix:
    """Trained keys and values in front of every document (arXiv:2101.00190).

    Letters: L layers, v virtual tokens of each of d documents.

    Attributes:
        states: keys and values [L, 2, K, v, D].
        positions: where the virtual tokens are in the sequence, int64 [d·v].
    """

    states: Tensor
    positions: Tensor

    def put_into(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the keys and values [1, K, T, D] of the virtual tokens.

        Raises:
            UserError: the layer's are not of the size that the model's config says.
        """
        if key.shape[1::2] != self.states.shape[2::2] or key.shape != value.shape:
            sizes = f"{list(key.shape[1::2])}, not {list(self.states.shape[2::2])}"
            message = f"layer {layer} of this model has keys of {sizes} as its config says"
            raise UserError(message, where="method.kind", fix="method.kind=prompt")
        documents = len(self.positions) // self.states.shape[3]
        keys, values = self.states[layer].to(key.dtype).repeat(1, 1, documents, 1).unsqueeze(1)
        return key.index_copy(2, self.positions, keys), value.index_copy(2, self.positions, values)


@dataclass(frozen=True)
class Documents:
    """The documents of a packed sequence, passed to attention instead of a mask.

    It is a class because engines rebuild tuples that pass through their wrappers.

    Attributes:
        lengths: tokens of each document.
        window: how many tokens a token sees, itself included; None: all before it.
        prefix: keys and values that replace those of virtual tokens.
    """

    lengths: tuple[int, ...]
    window: int | None
    prefix: Prefix | None = field(default=None, compare=False, repr=False)
    _borders: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def boundaries(self, device: torch.device) -> Tensor:
        """Start of each document, and the end of the last: int32 [documents + 1].

        The copy to a device is made once per forward pass, for all layers.
        """
        if device not in self._borders:
            ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
            self._borders[device] = send(ends, device)
        return self._borders[device]

    def flash_arguments(self, device: torch.device) -> dict[str, Any]:
        """What transformers' flash attention takes, and otherwise computes in every layer."""
        boundaries, longest = self.boundaries(device), max(self.lengths)
        return {
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def __getitem__(self, index: Any) -> Tensor:
        """Index the equivalent mask of sdpa, bool [1, 1, T, T], on the CPU.

        Gemma 4 slices it to the queries whose logits are asked for.
        """
        document = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        seen = (document[:, None] == document).tril()
        if self.window is not None:
            seen = seen.triu(1 - self.window)
        return seen[None, None][index]


_documents: ContextVar[Documents | None] = ContextVar("documents", default=None)


@contextmanager
def use_document_lengths(lengths: Sequence[int], prefix: Prefix | None = None) -> Iterator[None]:
    """Build the masks of the enclosed forward pass from known document lengths.

    Without it transformers and `detect_documents` read the lengths from the device and wait for it.

    Args:
        lengths: tokens of each document of the packed sequence.
        prefix: at the start of each document.
    """
    token = _documents.set(Documents(tuple(lengths), None, prefix))
    try:
        yield
    finally:
        _documents.reset(token)


def known_document_lengths(tokens: Tensor) -> tuple[int, ...] | None:
    """Tokens of each document of [1, T], if `use_document_lengths` set them."""
    documents = _documents.get()
    if documents is None or tokens.shape != (1, sum(documents.lengths)):
        return None
    return documents.lengths


def _document_indices(position_ids: Tensor) -> Tensor | None:
    """Replaces transformers' `find_packed_sequence_indices`, which waits for the device."""
    documents = _documents.get()
    if documents is None or known_document_lengths(position_ids) is None:
        return _transformers_document_indices(position_ids)
    if len(documents.lengths) == 1:
        return None
    positions = torch.arange(position_ids.shape[1], device=position_ids.device)
    inner_boundaries = documents.boundaries(position_ids.device)[1:-1]
    return torch.bucketize(positions, inner_boundaries, right=True).unsqueeze(0)


def _packed_mask_function(
    mask_function: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Callable[..., Tensor]:
    """transformers' function, which also records the mask inside each document."""
    assert _transformers_packed_mask_function is not None
    result = _transformers_packed_mask_function(mask_function, *args, **kwargs)
    result.inside = mask_function  # type: ignore[attr-defined]
    return result


_transformers_document_indices = masking_utils.find_packed_sequence_indices
_transformers_packed_mask_function: Callable[..., Callable[..., Tensor]] | None = getattr(
    masking_utils, "packed_sequence_compatibility_function", None
)
masking_utils.find_packed_sequence_indices = _document_indices
if _transformers_packed_mask_function is not None:  # else `detect_documents` finds them
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
    """The documents of a packed sequence; transformers calls this to build a mask.

    For anything else (padding, a key/value cache, several sequences or a mask of the model's own,
    as in generation) it returns sdpa's mask.
    """
    if batch_size == 1 and q_length == kv_length and attention_mask is None and not use_vmap:
        documents = _known_documents(mask_function, q_length)
        documents = documents or detect_documents(mask_function, q_length, device)
        if documents is not None:
            given = _documents.get()
            return replace(documents, prefix=given.prefix if given else None)
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
        attention_mask=attention_mask, use_vmap=use_vmap, device=device, **kwargs,
    )  # fmt: skip


def _known_documents(mask_function: Callable[..., Tensor], tokens: int) -> Documents | None:
    """The documents of `use_document_lengths`, with the window of a mask function; else None.

    The mask inside a document depends on positions alone, so it can be evaluated on the CPU.
    """
    documents = _documents.get()
    if documents is None or sum(documents.lengths) != tokens:
        return None
    # Without `inside`, transformers knows of no documents: gpt-oss passes no position ids on to it.
    knows_none = len(documents.lengths) == 1 or _transformers_packed_mask_function is not None
    inside = getattr(mask_function, "inside", mask_function if knows_none else None)
    longest = max(documents.lengths)
    try:
        detected = detect_documents(inside, longest, "cpu") if inside is not None else None
    except RuntimeError:  # the mask function uses tensors of another device
        return None
    if detected is None or detected.lengths != (longest,):
        return None
    return replace(documents, window=detected.window)


def detect_documents(
    mask_function: Callable[..., Tensor], tokens: int, device: torch.device | str
) -> Documents | None:
    """Find document lengths and window of a mask function in O(T); None if it is not causal.

    Args:
        mask_function: (batch, head, query position, key position) → whether the query sees the key.
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
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document.

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D]; H is a multiple of K.
        attention_mask: from `document_mask`.
        s_aux: [H], scores of a sink, which takes probability and adds nothing (gpt-oss).

    Returns:
        [1, T, H, D], and no attention weights.
    """
    if not isinstance(attention_mask, Documents):
        given = _documents.get()
        if given is not None and given.prefix is not None:
            message = "the attention masks of this model leave no place for a prefix"
            raise UserError(message, where="method.kind", fix="method.kind=prompt")
        mask = None if attention_mask is None else attention_mask.to(query.device)
        if s_aux is not None:
            key, value, mask = _with_sink(query, key, value, s_aux, mask)
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    lengths, window = attention_mask.lengths, attention_mask.window
    if attention_mask.prefix is not None:
        layer: Any = module.layer_idx
        key, value = attention_mask.prefix.put_into(layer, key, value)
    plain = dropout == 0.0 and s_aux is None
    if window is None and plain and supports_causal_attention(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, lengths, scale), None
    if dropout == 0.0 and varlen.supports_varlen(query, value, has_sinks=s_aux is not None):
        boundaries = attention_mask.boundaries(query.device)
        output = varlen.varlen_attention(
            query, key, value, boundaries, max(lengths), window, scaling, s_aux
        )
        return output, None
    # split, not slices: the gradient of each slice would be a zero-filled tensor of T tokens
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = [
        _one_document(q, k, v, dropout, scaling, window, s_aux)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scale: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in one document: [1, H, n, D] and [1, K, n, D] twice → [1, n, H, D]."""
    tokens = query.shape[2]
    mask = None
    if window is not None and tokens > window:
        square = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
        mask = square.tril() & square.triu(1 - window)
    if sinks is not None:
        key, value, mask = _with_sink(query, key, value, sinks, mask)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _shares_heads(query, value, mask):
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)


def _shares_heads(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether query heads can share keys without a matrix of all scores.

    On a GPU only flash attention can, and it takes no mask.
    """
    size, is_half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    takes = mask is None and is_half and size == value.shape[-1] <= varlen.MAX_HEAD_SIZE
    return takes or not query.is_cuda


def _with_sink(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with a sink after the last, and the scores to add for each head.

    Args:
        sinks: [H].
        mask: which keys are seen, bool […, T, T]; None: all before a token.

    Returns:
        [1, K, T + 1, D] twice and [1, H, T, T + 1]. The sink's key and value are zero, so its score
        is what is added.
    """
    tokens = query.shape[2]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    scores = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    scores = scores.masked_fill(~mask, -torch.inf).expand(1, len(sinks), tokens, tokens)
    column = sinks.to(query.dtype).view(1, -1, 1, 1).expand(-1, -1, tokens, -1)
    return pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1)), torch.cat([scores, column], dim=3)


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, document_mask)
