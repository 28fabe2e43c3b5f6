"""The recipe's group `train`: length, batch size, learning rate, optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.group import Count, Group, Share, Text
from dtrain.config.optimizers import OPTIMIZERS_HELP, OptimizerKind

LrScheduler = Literal["cosine", "linear", "constant", "warmup_stable_decay"]
LR_SCHEDULER_KEYS: dict[LrScheduler, frozenset[str]] = {
    "cosine": frozenset({"min_lr_ratio"}),
    "linear": frozenset({"min_lr_ratio"}),
    "constant": frozenset(),
    "warmup_stable_decay": frozenset({"min_lr_ratio", "decay_ratio", "decay_type"}),
}
"""The keys that each schedule reads in addition to `learning_rate` and `warmup_ratio`."""


class Train(Group):
    """Length of the training, batch size, optimizer."""

    global_batch_size: Count = Field(
        description="sequences per optimizer step, over all ranks",
    )
    micro_batch_size: Literal["auto"] | Count = Field(
        1, description="sequences per rank and forward pass; auto: as many as the plan allows"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="passes over the data (of a mixture: over the source with the largest weight)",
    )
    steps: Count | None = Field(None, description="optimizer steps, instead of epochs")
    tokens: Count | None = Field(
        None,
        description="tokens, instead of epochs; rounded up to a whole step",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        2e-4, description="peak, after the warm-up; lower it if the loss oscillates"
    )
    learning_rate_scales: dict[Text, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description=(
            "factors of the learning rate for some parameters, such as {embed_tokens: 0.1}: a "
            "pattern (RE2) matches the end of the name of a parameter or of a module around it; "
            "the first match counts"
        ),
    )
    lr_scheduler: LrScheduler = Field(
        "cosine",
        description=(
            "decay of the learning rate after the warm-up; warmup_stable_decay: constant, then "
            "decayed over the last steps"
        ),
    )
    warmup_ratio: Share = Field(0.03, description="share of the steps with a rising learning rate")
    min_lr_ratio: Share = Field(
        0.0, description="where the decay ends, as a share of `learning_rate`"
    )
    decay_ratio: Share = Field(
        0.1, description="warmup_stable_decay: share of the steps with a falling learning rate"
    )
    decay_type: Literal["linear", "cosine", "1-sqrt"] = Field(
        "linear", description="warmup_stable_decay: shape of the decay"
    )
    optimizer: OptimizerKind = Field("adamw", description=OPTIMIZERS_HELP)
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="decoupled, as in AdamW")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="clip the global gradient norm to this value",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description=(
            "cpt, sft: share of a target's probability that goes to all tokens evenly; held-out "
            "losses have none"
        ),
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="noise on the embeddings in training, such as 5 (NEFTune)"
    )
    evaluate_every_steps: Count | None = Field(
        None, description="measure the held-out loss every so many steps"
    )
    evaluate_on: str | None = Field(
        None,
        description="evaluation set for early stopping and `output.use: best`; default: the first",
    )
    maximize: Text | None = Field(
        None,
        description=(
            "metric of that set whose highest value is best, such as `accuracy`; default: its "
            "lowest loss is"
        ),
    )
    early_stopping_patience: Count | None = Field(
        None,
        description="stop after this many evaluations without a better held-out loss",
    )
    max_non_finite_steps: Count = Field(
        3,
        description="stop after this many steps in a row with NaN or infinite gradients",
    )
    on_divergence: Literal["stop", "warn"] = Field(
        "stop",
        description=(
            "what to do if the loss of the training, or of the set `evaluate_on`, rises above 1.5 "
            "times its value at the start of the stage and 0.5 more; stop: nothing is merged"
        ),
    )
    checkpoint_every_steps: Count | None = Field(
        None,
        description="save every so many steps; the last step is always saved",
    )

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass; 1 for `auto`, which divides every choice."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size
