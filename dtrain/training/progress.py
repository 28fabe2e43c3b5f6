"""Progress of a stage: the counters that a checkpoint records in addition to tensors."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StageProgress:
    """Counters of a stage, over all of its attempts.

    Attributes:
        step: optimizer steps finished.
        tokens: tokens trained on, without padding.
        starting_loss: the loss of the first step whose loss was finite.
        non_finite: steps whose update was skipped; `non_finite_in_a_row` of them most recently.
        ended_early: early stopping has ended the stage.
        evaluated_step: the step after which the held-out sets were last evaluated.
        held_out: the losses of that evaluation; None for one that was not finite.
        score: of the watched set then (`HeldOutEvaluator.score`).
        best_held_out: the lowest score of the watched set.
        evaluations_without_best: evaluations since then.
        seconds: spent in training steps.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    starting_loss: float | None = None
    non_finite_in_a_row: int = 0
    non_finite: int = 0
    ended_early: bool = False
    evaluated_step: int = 0
    held_out: dict[str, float | None] = field(default_factory=dict)
    score: float | None = None
    best_held_out: float | None = None
    evaluations_without_best: int = 0
    seconds: float = 0.0

    def tokens_per_second_since(self, start: StageProgress) -> float:
        """Mean speed of the steps after `start`; 0 if there were none."""
        if self.step == start.step:
            return 0.0
        return (self.tokens - start.tokens) / max(self.seconds - start.seconds, 1e-9)


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something that happens every so many steps happens after `step` steps."""
    return every_steps is not None and step % every_steps == 0
