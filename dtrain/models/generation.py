"""Text that a model in memory generates, greedily or sampled, in batches padded on the left.

Letters: B prompts of a batch, T tokens of the longest one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and what ends an answer.

    Attributes:
        max_new_tokens: longest answer.
        end_tokens: ids of tokens that end an answer.
        stop_texts: texts that end an answer; they are not part of it.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that have this probability together.
        seed: of the sampling.
    """

    max_new_tokens: int
    end_tokens: Sequence[int] = ()
    stop_texts: Sequence[str] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class SeededSampler(LogitsProcessor):
    """Samples each prompt's tokens with a generator of its own.

    transformers draws a batch from one generator, so that an answer would depend on the batch. Here
    a token is the inverse of the cumulative distribution at a number that depends on the seed, the
    row and the position alone; all other tokens become impossible.

    Args:
        rows: number of each prompt's row.
    """

    def __init__(self, decoding: Decoding, rows: Sequence[int]) -> None:
        self._temper = TemperatureLogitsWarper(decoding.temperature)
        self._nucleus = TopPLogitsWarper(decoding.top_p)
        self._generators = [_generator(decoding.seed, row) for row in rows]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [B, V] that leave one token a row."""
        kept = self._nucleus(input_ids, self._temper(input_ids, scores))
        cumulative = kept.double().softmax(-1).cumsum(-1)
        draws = torch.stack(
            [torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators]
        )
        reached = draws.to(scores.device) * cumulative[:, -1:]
        chosen = (cumulative <= reached).sum(-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)


def _generator(seed: int, row: int) -> torch.Generator:
    digest = blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.no_grad()
def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
    rows: Sequence[int] = (),
    *,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Answer each prompt, in one batch.

    Args:
        model: has transformers' `generate`.
        rows: number of each prompt's row, for sampling.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        # Masked, so that any will do for a tokenizer without an end of text.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
    ids: Tensor = batch["input_ids"].to(model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=batch["attention_mask"].to(ids.device),
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(decoding.end_tokens) or None,
        stop_strings=list(decoding.stop_texts) or None,
        logits_processor=[SeededSampler(decoding, rows)] if decoding.temperature else None,
        tokenizer=tokenizer,
        streamer=streamer,
        synced_gpus=False,
    )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [_before(text, decoding.stop_texts).strip() for text in texts]


def _before(text: str, stop_texts: Sequence[str]) -> str:
    """A text up to the first stop text, which transformers leaves in it."""
    for stop in stop_texts:
        text = text.partition(stop)[0]
    return text
