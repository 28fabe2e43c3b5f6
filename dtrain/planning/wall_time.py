"""The whole time of a stage: loading, training, evaluation, saves and the merge."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.config.schema import Recipe, Stage
from dtrain.planning.speed import PCIE_BYTES_PER_SECOND, Estimate
from dtrain.planning.storage import TokenCount, checkpoint_bytes, epoch_tokens
from dtrain.planning.workload import Workload

# Processes, libraries, the first collective, compiled kernels, the look at the base.
START_SECONDS = 60.0
# Reading or writing a model on a shared file system; local disks and page caches are faster.
STORAGE_BYTES_PER_SECOND = 1e9


@dataclass(frozen=True)
class WallTime:
    """Hours of a stage.

    Attributes:
        load: until the base is on the GPUs; of the first stage, with the start of the processes.
        training: with what is computed before the first step; None if the tokens are not known.
        evaluation: of held-out sets, during the stage and after it.
        saves, merge: of checkpoints, and into the base.
    """

    load: float
    training: Estimate | None
    evaluation: float
    saves: float
    merge: float

    @property
    def beside_training(self) -> float:
        """Hours of everything but the training."""
        return self.load + self.evaluation + self.saves + self.merge

    @property
    def total(self) -> Estimate | None:
        """Hours of all; None if the tokens are not known."""
        return self.training.plus(self.beside_training) if self.training else None


def stage_wall_time(
    recipe: Recipe,
    stage: Stage,
    workload: Workload,
    speed: Estimate,
    tokens: TokenCount | None,
    training: Estimate | None,
) -> WallTime:
    """The hours of a stage on its cluster.

    Args:
        speed: tokens a second of all ranks in training.
        tokens, training: what the stage trains on, and its hours; None if they are not known.
    """
    model = workload.element_bytes * workload.shape.parameters
    is_first = recipe.parent_of(stage) is None
    steps = tokens.tokens / workload.step_tokens if tokens else 0.0
    load = model / STORAGE_BYTES_PER_SECOND + START_SECONDS * is_first
    merge = 2 * model / STORAGE_BYTES_PER_SECOND * recipe.merges(stage)
    passes = _evaluations(stage, steps) + is_first  # the base is measured before the first step
    evaluation = passes * evaluation_tokens(recipe) / (speed.middle * forward_passes(workload))
    saved = checkpoint_bytes(workload)
    copies = 1 + steps // (stage.train.checkpoint_every_steps or float("inf"))
    saves = copies * saved / workload.ranks / PCIE_BYTES_PER_SECOND
    saves += saved / STORAGE_BYTES_PER_SECOND  # the last one; the others are written meanwhile
    return WallTime(load / 3600, training, evaluation / 3600, saves / 3600, merge / 3600)


def forward_passes(workload: Workload) -> float:
    """What training computes for a token, in forward passes."""
    return 2 + workload.traits.trains_base + workload.checkpointing + workload.extra_forwards


def evaluation_tokens(recipe: Recipe) -> float:
    """Tokens of all held-out sets that are on this machine."""
    return sum(epoch_tokens(data) or 0.0 for data in recipe.evaluation.sets.values())


def _evaluations(stage: Stage, steps: float) -> float:
    """How often the held-out sets are measured, during a stage and after it."""
    return 1 + steps // (stage.train.evaluate_every_steps or float("inf"))


def not_timed(recipe: Recipe) -> list[str]:
    """What the hours leave out; how long a model answers depends on what it says."""
    evaluation = recipe.evaluation
    missing = [name for name, data in evaluation.sets.items() if not epoch_tokens(data)]
    texts = ["answers to prompts"] * bool(evaluation.generation)
    texts += ["the tasks of lm-eval"] * bool(evaluation.tasks)
    texts += [f"evaluation set {name}, which is not on this machine" for name in missing]
    return texts
