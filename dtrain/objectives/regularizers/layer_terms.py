"""Terms that are a sum over adapted layers, of a function of the layer's two matrices.

The gradient is computed inside each layer's backward pass: there every engine has gathered the
layer's weights, and reduces what it adds to their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dtrain.config.schema import Stage
from dtrain.core.errors import UserError
from dtrain.data.loader import MicroBatch
from dtrain.objectives.base import LossOutput, Objective, global_weight
from dtrain.objectives.regularizers.base import AddedTerm


class MatrixFunction(Protocol):
    """A function of the two matrices of a layer's adapter."""

    def weights(self) -> tuple[Tensor, Tensor]:
        """The matrices, as the engine has gathered them."""

    def value(self, a: Tensor, b: Tensor) -> Tensor:
        """The function's value, float32."""

    def gradient(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of `value` by a and b."""


class LayersTerm(AddedTerm):
    """An objective with weight · Σ of a function over adapted layers.

    Attributes:
        term_weight: weight of the sum.
    """

    term_weight: float

    def __init__(self, stage: Stage, inner: Objective) -> None:
        super().__init__(stage, inner)
        self.layers: list[PenalizedLayer] = []
        self.pass_state = PassState()

    def penalize(self, layers: Mapping[str, tuple[nn.Module, MatrixFunction]]) -> None:
        """Add the functions of these layers, by their names."""
        self.layers = [
            PenalizedLayer(name, module, function, self.pass_state)
            for name, (module, function) in layers.items()
        ]

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        if not torch.is_grad_enabled():  # a measurement: the term is of the training
            output = self.inner.loss(model, batch, statistics)
            return self.add_term(output, output.loss, output.loss.new_zeros(()))
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
        state.factor = self.term_weight * global_weight(self.inner, self.loader, step) * share
        value = state.factor * torch.stack(self.values()).sum()
        return self.add_term(output, _RecordScale.apply(output.loss, state), value)

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
                where="method.target_modules",
                fix="leave them out",
            )
        return values


class PassState:
    """What the layers need to know in a forward and backward pass.

    Attributes:
        active: a penalized forward pass is running.
        factor: of the term in this micro-batch's loss.
        scale: what the training step multiplies that loss by, known in the backward pass.
    """

    active = False
    factor = 0.0
    scale: Tensor | float = 0.0


class PenalizedLayer:
    """A layer whose backward pass adds the function's gradient to that of its matrices.

    Attributes:
        value: the function in the last forward pass; None if that did not reach the layer.
    """

    def __init__(
        self, name: str, module: nn.Module, function: MatrixFunction, state: PassState
    ) -> None:
        self.name, self.function, self.state = name, function, state
        self.value: Tensor | None = None
        module.register_forward_hook(self._after_forward)

    def _after_forward(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not self.state.active or module.disable_adapters or not torch.is_grad_enabled():
            return None
        a, b = self.function.weights()
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            self.value = self.function.value(a, b)
        result: Tensor = _AddGradient.apply(output, a, b, self)
        return result


class _AddGradient(torch.autograd.Function):
    """Returns its input, and adds the function's gradient to that of a and b."""

    # Weights are referenced, not saved: sharding engines gather them into the same tensor again.
    @staticmethod
    def forward(ctx: Any, output: Tensor, a: Tensor, b: Tensor, layer: PenalizedLayer) -> Tensor:
        ctx.weights, ctx.layer = (a, b), layer
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), state = ctx.weights, ctx.layer.state
        with torch.autocast(a.device.type, enabled=False):
            da, db = ctx.layer.function.gradient(a, b)
        factor = state.factor * state.scale
        return gradient, (da * factor).to(a.dtype), (db * factor).to(b.dtype), None


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
