"""Penalties on the change of adapted weights: its squared norm, and elastic weight consolidation.

A LoRA adapter changes a weight by D = s·B·A. For factors u of the outputs and v of the inputs,

    1/2 Σ_ij u_i v_j D_ij² = s²/2 · tr((Bᵀ diag(u) B) (A diag(v) Aᵀ)),

which needs two r x r matrices and never D.

Letters: T tokens, h inputs and o outputs of a layer, r rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dtrain.config import regularize
from dtrain.objectives.base import ShardedModel, StageContext
from dtrain.objectives.regularizers.base import Regularized
from dtrain.objectives.regularizers.fisher import fisher_factors, penalized_layers
from dtrain.objectives.regularizers.layer_terms import LayersTerm

Diagonals = tuple[Tensor, Tensor]
"""u [o] and v [h] of a layer, float32."""


def penalty(a: Tensor, b: Tensor, scale: float, factors: Diagonals | None) -> Tensor:
    """1/2 Σ_ij u_i v_j (s·B·A)_ij² of a layer, float32.

    Args:
        a, b: [r, h] and [o, r].
        scale: s.
        factors: u and v; None for ones.
    """
    grams = _gram_of_b(b, factors) * _gram_of_a(a, factors)
    return 0.5 * scale**2 * grams.sum()  # both are symmetric


def penalty_gradient(
    a: Tensor, b: Tensor, scale: float, factors: Diagonals | None
) -> tuple[Tensor, Tensor]:
    """The gradient of `penalty` by a and b."""
    da, db = _gram_of_b(b, factors) @ a.float(), b.float() @ _gram_of_a(a, factors)
    if factors is not None:
        da, db = da * factors[1], db * factors[0].unsqueeze(1)
    return scale**2 * da, scale**2 * db


def _gram_of_a(a: Tensor, factors: Diagonals | None) -> Tensor:
    """A diag(v) Aᵀ, [r, r]."""
    a = a.float()
    return (a if factors is None else a * factors[1]) @ a.t()


def _gram_of_b(b: Tensor, factors: Diagonals | None) -> Tensor:
    """Bᵀ diag(u) B, [r, r]."""
    b = b.float()
    return b.t() @ (b if factors is None else b * factors[0].unsqueeze(1))


class ProductPenalty:
    """`penalty` of a layer."""

    def __init__(self, module: Any, factors: Diagonals | None) -> None:
        self.module, self.factors = module, factors

    @property
    def adapter(self) -> str:
        """PEFT's name of the adapter."""
        (name,) = self.module.active_adapters
        return str(name)

    def weights(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return (
            self.module.lora_A[self.adapter].weight,
            self.module.lora_B[self.adapter].weight,
        )

    def value(self, a: Tensor, b: Tensor) -> Tensor:
        """The penalty."""
        return penalty(a, b, self.module.scaling[self.adapter], self.factors)

    def gradient(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the penalty by a and b."""
        return penalty_gradient(a, b, self.module.scaling[self.adapter], self.factors)


class L2InitPenalty(LayersTerm, Regularized):
    """Half the squared change of the weights since the start of the stage."""

    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.context = context

    def begin_training(self, engine: ShardedModel) -> None:
        super().begin_training(engine)
        self.term_weight = self.regularize.weight
        with engine.autocast():
            factors = self.factors(engine.module)
        self.penalize(
            {
                name: (layer, ProductPenalty(layer, factors.get(name)))
                for name, layer in penalized_layers(engine.module).items()
            }
        )

    def factors(self, module: nn.Module) -> dict[str, Diagonals]:
        """Factors of layers, by their names; ones for a layer without."""
        return {}


class EwcPenalty(L2InitPenalty):
    """Elastic weight consolidation (arXiv:1612.00796) with a factored diagonal Fisher."""

    def factors(self, module: nn.Module) -> dict[str, Diagonals]:
        settings, device = self.regularize, self.context.world.device
        assert isinstance(settings, regularize.Ewc)
        found = fisher_factors(module, self.context, settings)
        return {
            name: (found[f"{name}.u"].to(device), found[f"{name}.v"].to(device))
            for name in penalized_layers(module)
        }
