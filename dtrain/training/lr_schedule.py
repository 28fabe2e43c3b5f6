"""Learning rate and length of a stage, as arithmetic on the step number."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, cos, pi

from dtrain.config.schema import Train


def learning_rate(step: int, steps: int, train: Train) -> float:
    """Learning rate of `step` (from 0) of `steps`: linear warm-up, then decay by the schedule."""
    warmup = ceil(train.warmup_ratio * steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + cos(pi * done))}
    return train.learning_rate * shape[train.lr_scheduler]


def total_sequences(
    train: Train, sequences_in_epochs: Callable[[float], int], tokens_per_row: float
) -> int:
    """Sequences that the stage trains on; only `epochs` may end inside a global batch.

    Args:
        rows_of: sequences in so many passes.
        tokens_per_row: mean number of tokens in a sequence, padding not counted.
    """
    batch = train.global_batch_size
    if train.steps is not None:
        return train.steps * batch
    if train.tokens is not None:
        return ceil(train.tokens / (tokens_per_row * batch)) * batch
    assert train.epochs is not None
    return sequences_in_epochs(train.epochs)
