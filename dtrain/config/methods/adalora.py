"""AdaLoRA: its recipe keys, and its budget of ranks by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count
from dtrain.config.methods.base import LowRankSettings, MethodTraits, Shapes

BETA = 0.85  # of both moving averages, as in the paper and in PEFT
Ratio = Annotated[float, Field(ge=0, lt=1)]


class AdaLora(LowRankSettings):
    """Adapters P Λ Q, as in a singular value decomposition, whose ranks are cut during the training
    where they matter least (arXiv:2303.10512)."""

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]] = {
        "adalora": MethodTraits(
            title="AdaLoRA",
            implementation="dtrain.methods.adalora:AdaLoraMethod",
            objective="dtrain.objectives.regularizers.rank_allocation:RankAllocation",
            adds_adapter=True,
            base_when_disabled=True,
        ),
    }
    kind: Literal["adalora"]
    r: Count = Field(12, description="rank of each layer at the start")
    target_r: Count | None = Field(
        None, description="mean rank of the layers at the end; default: two thirds of r"
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the adapter is scaled by alpha / r; default: 2 r"
    )
    initial_ratio: Ratio = Field(
        0.1, description="share of the steps, at the start, in which all ranks are kept"
    )
    final_ratio: Ratio = Field(
        0.3, description="share of the steps, at the end, in which ranks do not change any more"
    )
    allocate_every_steps: Count = Field(
        10,
        description="steps between two cuts to the ranks with the highest scores of all layers; a "
        "rank that was cut trains on, and may be kept at the next",
    )
    orthogonality_weight: Annotated[float, Field(ge=0)] = Field(
        0.5,
        description="factor of the mean distance of the matrices P and Q from orthogonal ones, "
        "which is added to the loss",
    )

    @property
    def final_rank(self) -> int:
        """Mean rank of the layers at the end."""
        return self.target_r or max(1, self.r * 2 // 3)

    @property
    def kept_values(self) -> int:
        return 3  # the averages of sensitivity and uncertainty, and the sensitivity of a step

    def peft_config(self) -> dict[str, Any]:
        """The settings of PEFT's AdaLoraConfig; its schedule is over once the adapter is saved."""
        return {
            "peft_type": "ADALORA",
            "init_r": self.r,
            "target_r": self.final_rank,
            "lora_alpha": 2.0 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "orth_reg_weight": self.orthogonality_weight,
            "deltaT": self.allocate_every_steps,
            "beta1": BETA,
            "beta2": BETA,
            "total_step": 1,
        }

    def shapes(self, layer: str, outputs: int, inputs: int) -> Shapes:
        """Q, Λ and P."""
        return (self.r, inputs), (self.r, 1), (outputs, self.r)

    def budget(self, update: int, updates: int, layers: int) -> int | None:
        """The sum of the ranks to keep after an update; None if ranks are not cut then.

        The cubic schedule of the paper's equation 12, from r at the end of the initial phase to
        the final rank at the start of the final one. The paper prints t - t_i - t_f in the
        numerator, which has neither value; its code, and PEFT, use t - t_i.

        Args:
            update: from 1.
            updates: of the whole stage.
        """
        initial = int(self.initial_ratio * updates)
        last = updates - int(self.final_ratio * updates)
        if update != last and update % self.allocate_every_steps:
            return None
        if not initial < update <= last:
            return None
        remaining = 1 - (update - initial) / (last - initial)
        return int((self.r - self.final_rank) * layers * remaining**3 + self.final_rank * layers)

    def is_final(self, update: int, updates: int) -> bool:
        """Whether the ranks were cut for the last time before an update."""
        return update > updates - int(self.final_ratio * updates)
