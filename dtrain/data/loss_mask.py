"""Find the tokens that contain at least one character of an answer.

Asking a tokenizer for the characters of every token takes a third more time. If a vocabulary is
made of bytes, as GPT-2's and its successors', and tokens are a text's bytes in order, the byte
lengths of the tokens give the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from dtrain.data.chat_templates import Span

Int32s = NDArray[np.int32]

QUIET = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
# Spaces at all edges, repeated ones, characters of one to four bytes, combined characters.
PROBE = "x a  b\n\nc\t don't 12345\r\n ß é漢字 e\u0301 👩🏽‍🚀 \u00a0x  \n"


class TokenByteLengths:
    """Number of bytes of each token of a byte-level vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, core = tokenizer, tokenizer.backend_tokenizer
        vocabulary = core.get_vocab(with_added_tokens=True)
        self.sizes = np.zeros(max(vocabulary.values(), default=0) + 1, np.int32)
        for token, token_id in vocabulary.items():
            self.sizes[token_id] = len(token)  # a character stands for a byte
        for token_id, added in core.get_added_tokens_decoder().items():
            self.sizes[token_id] = len(added.content.encode())

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenByteLengths | None:
        """Return None if the lengths do not reproduce the tokenizer's own offsets of a probe."""
        lengths = cls(tokenizer)
        (encoding,) = tokenizer([PROBE], add_special_tokens=False, **QUIET).encodings
        bounds = np.cumsum([0, *(len(character.encode()) for character in PROBE)])
        ends = np.cumsum(lengths.sizes[encoding.ids])
        firsts = bounds.searchsorted(ends - lengths.sizes[encoding.ids], side="right") - 1
        offsets = list(zip(firsts.tolist(), bounds.searchsorted(ends).tolist(), strict=True))
        return lengths if offsets == encoding.offsets else None

    def encode(
        self, texts: list[str], spans: list[list[Span]]
    ) -> Iterator[tuple[Int32s, Int32s] | None]:
        """Yield tokens and target runs of each text; None if its tokens are not its bytes."""
        self.tokenizer(["a"], **QUIET)  # resets padding and truncation, which files may set
        core = self.tokenizer.backend_tokenizer
        encodings = core.encode_batch_fast(texts, add_special_tokens=False)
        for encoding, text, answers in zip(encodings, texts, spans, strict=True):
            tokens = np.array(encoding.ids, dtype=np.int32)
            ends = np.cumsum(self.sizes[tokens])
            size = len(text) if text.isascii() else len(text.encode())
            fits = (int(ends[-1]) if ends.size else 0) == size
            yield (tokens, _runs_of_bytes(ends, text, answers)) if fits else None


def _runs_of_bytes(ends: NDArray[np.int64], text: str, spans: list[Span]) -> Int32s:
    edges = np.array(spans, dtype=np.int64).reshape(-1)
    if not text.isascii():
        edges = np.array([len(text[:edge].encode()) for edge in edges.tolist()], dtype=np.int64)
    firsts = ends.searchsorted(edges[::2], side="right").tolist()
    stops = (ends.searchsorted(edges[1::2], side="left") + 1).tolist()
    return _join_runs(zip(firsts, stops, strict=True))


def target_runs(encoding: Encoding, text: str, spans: list[Span]) -> Int32s:
    """Return runs of the tokens that contain at least one character of an answer.

    Args:
        encoding: of the text.
        spans: (start, stop) of the characters of each answer, in order.

    Returns:
        int32 [2 k]: start and stop of each run; token 0 cannot be predicted and is in none.
    """
    runs = []
    for start, stop in spans:
        edges = _edges(encoding, text, start, stop)
        if edges is None:
            return _runs_of_offsets(encoding.offsets, spans)
        runs.append(edges)
    return _join_runs(runs)


def _join_runs(runs: Iterable[tuple[int, int]]) -> Int32s:
    """Remove token 0 from the runs, and join runs that touch."""
    edges: list[int] = []
    for first, end in runs:
        first = max(first, 1)
        if edges and first <= edges[-1]:  # a token with characters of two answers
            edges[-1] = max(end, edges[-1])
        elif first < end:
            edges += first, end
    return np.array(edges, dtype=np.int32)


def _edges(encoding: Encoding, text: str, start: int, stop: int) -> tuple[int, int] | None:
    """First token of a span and the one after its last; None if only the offsets show them."""
    if start >= stop:
        return None
    first = encoding.char_to_token(start)
    end = len(encoding) if stop == len(text) else encoding.char_to_token(stop)
    if first is None or end is None or not first < end:
        return None
    opens, last, behind = (
        encoding.token_to_chars(first),
        encoding.token_to_chars(end - 1),
        encoding.token_to_chars(end) if end < len(encoding) else (stop, stop),
    )
    # Tokens may share a character, have none, or cross the edge.
    simple = opens and last and behind and last[0] < stop <= behind[0] and opens[1] > start
    return (first, end) if simple else None


def _runs_of_offsets(offsets: list[Span], spans: list[Span]) -> Int32s:
    if not offsets or not spans:
        return np.empty(0, dtype=np.int32)
    edges = np.array(offsets, dtype=np.int64)
    mask = np.zeros(len(offsets) + 2, dtype=bool)  # false on either side ends every run
    for start, stop in spans:
        mask[1:-1] |= (edges[:, 0] < stop) & (edges[:, 1] > start)
    mask[1] = False
    return np.flatnonzero(mask[1:] != mask[:-1]).astype(np.int32)
