"""The learning rate as arithmetic of the step: a resumed or lengthened stage needs no state."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, cos, pi, sqrt

from dtrain.config.train import Train

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + cos(pi * done)),
    "1-sqrt": lambda done: 1.0 - sqrt(done),
}
"""Share of the decay that is done, 0 to 1 → what is left of the learning rate, 1 to 0."""


def learning_rate(step: int, steps: int, train: Train) -> float:
    """Learning rate of `step` (from 0) of `steps`.

    It rises linearly during the warm-up, is constant, and falls during the decay: over all steps
    after the warm-up, or over the last ones (warmup_stable_decay, arXiv:2404.06395). A stage with
    warmup_stable_decay that is resumed with more steps continues at the constant rate.
    """
    warmup = ceil(train.warmup_ratio * steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.lr_scheduler == "constant":
        return train.learning_rate
    decay: str = train.lr_scheduler
    decay_steps = steps - warmup
    if decay == "warmup_stable_decay":
        decay, decay_steps = train.decay_type, min(decay_steps, ceil(train.decay_ratio * steps))
    done = max(0, step - (steps - decay_steps)) / max(1, decay_steps)
    share = train.min_lr_ratio + (1.0 - train.min_lr_ratio) * DECAYS[decay](done)
    return train.learning_rate * share
