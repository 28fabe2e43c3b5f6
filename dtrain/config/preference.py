"""Settings of the objectives that compare or rate answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.group import Group

PairLoss = Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down"]
Weight = Annotated[float, Field(ge=0)]


class PreferenceSettings(Group):
    """How answers are compared; for the kinds dpo, kto, orpo, simpo and cpo."""

    loss: PairLoss = Field(
        "sigmoid",
        description=(
            "dpo: sigmoid (arXiv:2305.18290), robust (arXiv:2403.00409), hinge "
            "(arXiv:2309.06657), ipo (arXiv:2310.12036), apo_zero or apo_down (arXiv:2408.06266)"
        ),
    )
    beta: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description=(
            "how closely the model stays to its reference, or the scale of the margin; default "
            "0.1, of simpo 2.0"
        ),
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="dpo with sigmoid or robust: probability that a pair's label is wrong"
    )
    length_normalized: bool = Field(
        False, description="dpo: compare log-probabilities per token instead of their sums"
    )
    sft_weight: Weight | None = Field(
        None,
        description=(
            "weight of the chosen answer's cross-entropy per token, added to the loss of dpo "
            "(default 0, arXiv:2404.19733) and cpo (default 1)"
        ),
    )
    target_margin: Weight = Field(
        0.5, description="simpo: margin by which the chosen answer should win (gamma)"
    )
    precompute_reference: bool = Field(
        False,
        description=(
            "dpo and kto: compute the reference's log-probabilities once, before the training, "
            "and store them, instead of in every step; always done where no adapter can be "
            "switched off, as with full"
        ),
    )
    desirable_weight: Weight = Field(1.0, description="kto: weight of desirable answers")
    undesirable_weight: Weight = Field(1.0, description="kto: weight of undesirable answers")
