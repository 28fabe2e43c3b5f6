"""Penalties on the change of adapted weights: its squared norm, and elastic weight consolidation.

A LoRA adapter changes a weight by D = s·B·A. For factors u of the outputs and v of the inputs,

    1/2 Σ_ij u_i v_j D_ij² = s²/2 · tr((Bᵀ diag(u) B) (A diag(v) Aᵀ)),

which needs two r x r matrices and never D. Its gradient is computed inside each adapted layer's
backward pass: there every engine has gathered the layer's weights, and reduces what it adds to
their gradient.

Letters: T tokens, h inputs and o outputs of a layer, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dtrain.config import regularize
from dtrain.config.schema import Stage
from dtrain.core.errors import UserError
from dtrain.data.loader import MicroBatch
from dtrain.objectives.base import LossOutput, ShardedModel, StageContext, global_weight
from dtrain.objectives.regularizers.base import Regularized, add_term
from dtrain.objectives.regularizers.fisher import adapted_layers, fisher_factors

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


class WeightChangePenalty(Regularized):
    """weight/2 · Σ F (W - W0)² over the adapted layers."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.layers: list[PenalizedLayer] = []
        self.pass_state = PassState()

    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.context = context

    def begin_training(self, engine: ShardedModel) -> None:
        super().begin_training(engine)
        with engine.autocast():
            factors = self.factors(engine.module)
        self.layers = [
            PenalizedLayer(name, layer, factors.get(name), self.pass_state)
            for name, layer in adapted_layers(engine.module).items()
        ]

    def factors(self, module: nn.Module) -> dict[str, Diagonals]:
        """Factors of layers, by their names; ones for a layer without."""
        return {}

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        state = self.pass_state
        state.active = True
        for layer in self.layers:
            layer.value = None
        try:
            output = self.inner.loss(model, batch, statistics)
        finally:
            state.active = False
        # A micro-batch counts by its weight: over the global batch the penalty counts once.
        step = self.step(batch)
        share = output.weight / max(1, self.inner.weight(self.loader.counts(step)))
        state.factor = self.regularize.weight * global_weight(self.inner, self.loader, step) * share
        value = state.factor * torch.stack(self.values()).sum()
        return add_term(output, _RecordScale.apply(output.loss, state), value)

    def values(self) -> list[Tensor]:
        """The penalty of each layer in the forward pass just run.

        Raises:
            UserError: the pass left a layer out, so that its penalty would have no gradient.
        """
        values = [layer.value for layer in self.layers if layer.value is not None]
        if missing := [layer.name for layer in self.layers if layer.value is None]:
            raise UserError(
                f"a micro-batch does not reach {len(missing)} of the adapted layers, such as "
                f"{missing[0]}",
                where="regularize",
                fix="leave them out of method.target_modules, or use kind=kl_to_base",
            )
        return values


class L2InitPenalty(WeightChangePenalty):
    """Half the squared change of the weights since the start of the stage."""


class EwcPenalty(WeightChangePenalty):
    """Elastic weight consolidation (arXiv:1612.00796) with a factored diagonal Fisher."""

    def factors(self, module: nn.Module) -> dict[str, Diagonals]:
        settings, device = self.regularize, self.context.world.device
        assert isinstance(settings, regularize.Ewc)
        found = fisher_factors(module, self.context, settings)
        return {
            name: (found[f"{name}.u"].to(device), found[f"{name}.v"].to(device))
            for name in adapted_layers(module)
        }


class PassState:
    """What the layers need to know in a forward and backward pass.

    Attributes:
        active: a penalized forward pass is running.
        factor: of the penalty in this micro-batch's loss.
        scale: what the training step multiplies that loss by, known in the backward pass.
    """

    active = False
    factor = 0.0
    scale: Tensor | float = 0.0


class PenalizedLayer:
    """A layer whose backward pass adds the penalty's gradient to that of A and B.

    Attributes:
        value: the penalty in the last forward pass; None if that did not reach the layer.
    """

    def __init__(
        self, name: str, module: nn.Module, factors: Diagonals | None, state: PassState
    ) -> None:
        self.name, self.factors, self.state = name, factors, state
        self.value: Tensor | None = None
        module.register_forward_hook(self._after_forward)

    def _after_forward(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not self.state.active or module.disable_adapters or not torch.is_grad_enabled():
            return None
        (name,) = module.active_adapters
        a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            self.value = penalty(a, b, scale, self.factors)
        result: Tensor = _AddGradient.apply(output, a, b, scale, self)
        return result


class _AddGradient(torch.autograd.Function):
    """Returns its input, and adds the penalty's gradient to that of A and B."""

    # Weights are referenced, not saved: sharding engines gather them into the same tensor again.
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, a: Tensor, b: Tensor, scale: float, layer: PenalizedLayer
    ) -> Tensor:
        ctx.weights, ctx.scale, ctx.layer = (a, b), scale, layer
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), state = ctx.weights, ctx.layer.state
        with torch.autocast(a.device.type, enabled=False):
            da, db = penalty_gradient(a, b, ctx.scale, ctx.layer.factors)
        factor = state.factor * state.scale
        return gradient, (da * factor).to(a.dtype), (db * factor).to(b.dtype), None, None


class _RecordScale(torch.autograd.Function):
    """Returns the loss; its backward pass is the first, and records what the loss is scaled by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, state: PassState) -> Tensor:
        ctx.state = state
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.state.scale = gradient
        return gradient, None
