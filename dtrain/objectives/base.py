"""The protocol of an objective: rows it accepts, how they become documents, and their loss.

The training loop and the evaluator see nothing else. A step runs:

    weight = objective.weight(loader.counts(step))           # the same on all ranks
    statistics = objective.begin_step(model, batches, world)
    for batch in batches:
        output = objective.loss(model, batch, statistics)
        backward(output.loss / weight)                       # summed over micro-batches and ranks

Letters: T tokens of a micro-batch, I items (targets, or examples such as pairs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from dtrain.checkpoints.parameter_shards import ParameterShard
from dtrain.config.objectives import OBJECTIVES
from dtrain.config.schema import EvaluationSet, Stage
from dtrain.core.lazy_import import import_object
from dtrain.data.loader import Loader, MicroBatch
from dtrain.data.packed_dataset import BatchCounts, PackedDataset
from dtrain.data.prepare import DatasetSpec
from dtrain.distributed.world import World
from dtrain.objectives.stored_values import StoredValues


@dataclass(frozen=True)
class LossOutput:
    """The loss of a micro-batch, before it is normalized.

    Attributes:
        loss: float32 scalar with a gradient, the sum over the items.
        weight: what the sum is divided by; over a global batch it adds up to `Objective.weight`.
        item_losses: [I], without a gradient.
        metric_sums: scalars without a gradient, by `Objective.metric_sum_names`; they are summed
            over micro-batches and ranks before `Objective.metrics` sees them.
    """

    loss: Tensor
    weight: float
    item_losses: Tensor
    metric_sums: Mapping[str, Tensor] = field(default_factory=dict)


class FrozenModels(Protocol):
    """Models that only compute forward, by the recipe's names of their folders."""

    def load(self, address: str) -> nn.Module:
        """The model in the compute dtype; called on all ranks together."""

    def fingerprint(self, address: str) -> str:
        """What identifies its content."""


@dataclass(frozen=True)
class StageContext:
    """What an objective may need in addition to its batches.

    Attributes:
        base: folder of the model that the stage starts from.
        cache: folder for what is computed once, such as reference log-probabilities or a
            teacher's logits; see `StoredValues`.
        folder: of the stage, which all ranks see.
        start: what decides the output of the model as the stage starts: base, dtype, method.
        base_when_disabled: whether `adapters_disabled` turns the model back into that model.
        loader: the batches of the stage or of the held-out set.
        frozen: other models, which only compute forward.
        previous: the data of the stage before this one.
    """

    base: Path
    cache: Path
    folder: Path
    start: Mapping[str, Any]
    base_when_disabled: bool
    loader: Loader
    world: World
    frozen: FrozenModels
    previous: PackedDataset | None = None


class ShardedModel(Protocol):
    """What an objective may use of an engine, which `dtrain.engines.base.Engine` describes.

    Attributes:
        module: the model without the engine's wrapping: gradients stay on this rank.
    """

    model: Any
    module: nn.Module
    replica: tuple[int, int]
    kept: dict[str, dict[str, Tensor]]

    def autocast(self) -> AbstractContextManager[object]: ...
    def before_forward(self, *, last: bool) -> None: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def drop_gradient(self) -> None: ...
    def on_weights_changed(self) -> None: ...
    def parameter_shards(self, *, gradients: bool = False) -> Iterator[ParameterShard]: ...


class Objective(ABC):
    """What a stage minimizes.

    Attributes:
        dataset: how rows become documents and sequences, for data preparation.
        metric_sum_names: sums that every micro-batch reports; the same on every rank.
        stored: values that the model as the stage starts must compute before the training;
            `begin_stage` sets it.
    """

    dataset: ClassVar[DatasetSpec]
    metric_sum_names: tuple[str, ...] = ()
    stored: StoredValues | None = None

    def __init__(self, settings: Stage | EvaluationSet) -> None:
        self.settings = settings

    def check_data(self, dataset: PackedDataset) -> None:
        """Check that a stage's prepared data can be trained on.

        Raises:
            UserError: it cannot.
        """
        return

    def begin_stage(self, context: StageContext) -> None:
        """Load or compute what `loss` needs in addition to batches.

        Called once, on all ranks, before the stage's model is loaded.
        """
        return

    def start_values(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Compute what `stored` lacks of a micro-batch.

        Args:
            model: as wrapped by the engine; it computes as it does when the stage starts.
            batch: on the model's device.
        """
        raise NotImplementedError

    def begin_training(self, engine: ShardedModel) -> None:
        """Compute what the loss needs of the stage's model; called once, on all ranks, after
        `begin_stage`.

        Args:
            engine: at the weights that the stage starts from, also when it is resumed.
        """
        return

    def begin_step(self, model: nn.Module, batches: Iterable[MicroBatch], world: World) -> Any:
        """Compute a statistic over the global batch or a held-out set, such as KTO's baseline.

        Called on all ranks before the first loss of a step, so it may use collectives.

        Args:
            model: as wrapped by the engine.
            batches: this rank's micro-batches, on the CPU (`MicroBatch.to` moves one).
            world: sums over ranks.

        Returns:
            What `loss` receives as `statistics`.
        """
        return None

    @abstractmethod
    def weight(self, counts: BatchCounts) -> int:
        """What the summed loss of a batch with these counts is divided by."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        """Compute the loss of a micro-batch.

        Args:
            model: as wrapped by the engine; `adapters_disabled` turns it into its base.
            batch: on the model's device.
            statistics: from `begin_step`.
        """

    def before_update(self, engine: ShardedModel) -> None:
        """See or change the gradient of a step, before it is clipped; called on all ranks."""
        return

    def after_update(self, engine: ShardedModel, step: int, *, updated: bool) -> None:
        """See or change the weights after a step; called on all ranks.

        Args:
            step: from 0.
            updated: False if the update was skipped, as its gradient was not finite.
        """
        return

    @abstractmethod
    def item_positions(self, batch: MicroBatch) -> NDArray[np.int64]:
        """Return where in the micro-batch each item is: int64 [I], 0 … T - 1."""

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float]:
        """Turn sums over a global batch or a held-out set into what is logged."""
        return {}


def global_weight(objective: Objective, loader: Loader, step: int) -> float:
    """What the summed loss of a step is divided by: each source counts by its loss weight."""
    if not loader.loss_weights.size:
        return max(1, objective.weight(loader.counts(step)))
    counts = loader.counts_by_source(step).values()
    weights = zip(loader.loss_weights.tolist(), map(objective.weight, counts), strict=True)
    return sum(factor * weight for factor, weight in weights) or 1.0


def objective_class(kind: str) -> type[Objective]:
    """The class of an objective that a recipe names."""
    implementation: type[Objective] = import_object(OBJECTIVES[kind].implementation)
    return implementation


def build_objective(settings: Stage | EvaluationSet) -> Objective:
    """Build what a stage minimizes, or what an evaluation set measures."""
    return objective_class(settings.kind)(settings)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Let the model compute as its base does, without changing what requires a gradient."""
    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper  # adapters, and copies of whole modules
    layers: list[Any] = [m for m in model.modules() if isinstance(m, kinds)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
