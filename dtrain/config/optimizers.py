"""Optimizers and their traits that need no torch: the one table that checks and planning read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

OptimizerKind = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "adafactor",
    "muon",
    "schedule_free",
]


@dataclass(frozen=True)
class OptimizerTraits:
    """What an optimizer keeps, and what it needs.

    Attributes:
        description: one clause for the recipe reference.
        state_bytes: bytes of its state for a parameter.
        layer_matrix_bytes: the same in matrices of decoder layers, where it differs.
        whole_parameters: its state does not divide with a parameter's elements, so that each rank
            must have whole parameters: it comes in blocks, or for rows and columns, or the update
            multiplies matrices.
        trains_adapters: works on what a method adds to the base.
        averages: results and evaluations use an average of the weights of all steps, which stands
            for the decay of the learning rate. A checkpoint has the weights that train, too.
        module: that has it; dtrain's extra of the same name installs it. Empty: always installed.
    """

    description: str
    state_bytes: float
    layer_matrix_bytes: float | None = None
    whole_parameters: bool = False
    trains_adapters: bool = True
    averages: bool = False
    module: str = ""


OPTIMIZERS: dict[str, OptimizerTraits] = {
    "adamw": OptimizerTraits("two float32 a parameter (arXiv:1711.05101)", state_bytes=8.0),
    # An 8-bit state has a float32 for each block of 256 elements.
    "adamw_8bit": OptimizerTraits("in 8 bits", state_bytes=2.03, whole_parameters=True),
    "paged_adamw_8bit": OptimizerTraits(
        "in 8 bits, moved to the host when memory is short", state_bytes=2.03, whole_parameters=True
    ),
    "lion": OptimizerTraits(
        "one float32; wants a third of AdamW's rate (arXiv:2302.06675)", state_bytes=4.0
    ),
    "lion_8bit": OptimizerTraits("in 8 bits", state_bytes=1.02, whole_parameters=True),
    "adafactor": OptimizerTraits(
        "a float32 for each row and column (arXiv:1804.04235)",
        state_bytes=0.01,
        whole_parameters=True,
    ),
    "muon": OptimizerTraits(
        "one float32 in matrices of layers and of experts, whose updates are orthogonal; AdamW "
        "elsewhere, at the same rate (arXiv:2502.16982)",
        state_bytes=8.0,
        layer_matrix_bytes=4.0,
        whole_parameters=True,
        trains_adapters=False,
    ),
    "schedule_free": OptimizerTraits(
        "AdamW whose result is the average of the weights of all steps, for any number of steps; "
        "wants 1 to 10 times AdamW's rate, and lr_scheduler: constant (arXiv:2405.15682)",
        state_bytes=8.0,
        averages=True,
        module="schedulefree",
    ),
}
assert tuple(OPTIMIZERS) == get_args(OptimizerKind)
OPTIMIZERS_HELP = "; ".join(f"{kind}: {x.description}" for kind, x in OPTIMIZERS.items())
