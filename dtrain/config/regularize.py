"""Terms against forgetting: their recipe keys, and their traits that need no torch.

`dtrain.objectives.regularizers` computes them. To add one, add its settings here, name them in
`Regularize`, and write the class that its traits name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count, Group


@dataclass(frozen=True)
class RegularizerTraits:
    """What is known of a term without torch.

    Attributes:
        implementation: "module:class" of its `dtrain.objectives.regularizers.base.Regularized`.
        needs_base: the model without its adapter computes the chosen rows too.
        of_base_parameters: the same where the base's own parameters train, of a term that is a
            function of the change of the weights.
    """

    implementation: str
    of_base_parameters: str = ""
    needs_base: bool = False

    @property
    def penalizes_change(self) -> bool:
        """Whether it is a function of the change of the weights since the start of the stage."""
        return bool(self.of_base_parameters)


class RegularizeSettings(Group):
    """The keys that all terms share."""

    traits: ClassVar[RegularizerTraits]
    kind: str
    weight: Annotated[float, Field(gt=0)] = Field(
        description="factor of the term in the loss of a step"
    )

    def extra_forwards(self, replay_ratio: float) -> float:
        """Forward passes of each token without a backward pass.

        Args:
            replay_ratio: share of `data.replay` in the tokens.
        """
        if not self.traits.needs_base:
            return 0.0
        return replay_ratio if self.reads_replay else 1.0

    @property
    def sequences_before(self) -> int:
        """Sequences that are computed before the first step."""
        return 0

    @property
    def kept_values(self) -> int:
        """Values kept for each of the base's own parameters that trains."""
        return int(self.traits.penalizes_change)

    @property
    def reads_replay(self) -> bool:
        """Whether it needs `data.replay`."""
        return getattr(self, "on", None) == "replay"

    @property
    def reads_previous_stage(self) -> bool:
        """Whether it needs the rows of the stage before."""
        return getattr(self, "on", None) == "previous_stage"


class KlToBase(RegularizeSettings):
    """The mean of KL(base || model) at targets, where the base is the model that the stage started
    from: what it says stays likely (arXiv:1606.09282)."""

    traits: ClassVar[RegularizerTraits] = RegularizerTraits(
        implementation="dtrain.objectives.regularizers.kl_to_base:KlToBaseRegularizer",
        needs_base=True,
    )
    kind: Literal["kl_to_base"]
    on: Literal["replay", "all"] = Field(
        "replay", description="the targets: those of `data.replay`, or of all rows"
    )


class L2Init(RegularizeSettings):
    """Half the squared change of the weights, adapted or trained, since the start of the stage."""

    traits: ClassVar[RegularizerTraits] = RegularizerTraits(
        implementation="dtrain.objectives.regularizers.weight_change:L2InitPenalty",
        of_base_parameters="dtrain.objectives.regularizers.parameter_change:L2InitOfParameters",
    )
    kind: Literal["l2_init"]


class Ewc(RegularizeSettings):
    """Elastic weight consolidation (arXiv:1612.00796): as l2_init, but each weight's square counts
    by its Fisher information, per target, of rows that the model shall not forget. It is estimated
    before the first step: for an adapted layer by a row and a column of factors, for parameters of
    the base that train by a factor for each."""

    traits: ClassVar[RegularizerTraits] = RegularizerTraits(
        implementation="dtrain.objectives.regularizers.weight_change:EwcPenalty",
        of_base_parameters="dtrain.objectives.regularizers.parameter_change:EwcOfParameters",
    )
    kind: Literal["ewc"]
    on: Literal["replay", "previous_stage"] = Field(
        "replay", description="the rows: those of `data.replay`, or of the stage before"
    )
    sequences: Count = Field(128, description="sequences of these rows")

    @property
    def sequences_before(self) -> int:
        return self.sequences

    @property
    def kept_values(self) -> int:
        return 2


Regularize = Annotated[KlToBase | L2Init | Ewc, Field(discriminator="kind")]
