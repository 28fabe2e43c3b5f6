"""DoRA (arXiv:2402.09353): a LoRA layer whose weight rows have trained lengths.

    y = g ∘ (x Wᵀ + s drop(x) Aᵀ Bᵀ) + bias,   g = m / ‖W + s B A‖ of each row

No gradient flows through the norm (section 4.3). Its square is computed without the matrix B A:

    ‖w + s b A‖² = ‖w‖² + 2 s (A w)·b + s² b A Aᵀ bᵀ   for a row w of W and b of B

‖w‖² never changes and A Wᵀ costs as much as r tokens. Dropout acts on the input of A alone, so that
x Wᵀ is computed once; PEFT drops elements of the x of (g - 1) x Wᵀ too, and computes x Wᵀ twice.

Letters: h width of x, o of y, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from dtrain.core.errors import UserError
from dtrain.models.kernels import matmul
from dtrain.models.quantize import dequantized, quantization_state


class Magnitude(nn.Module):
    """The trained lengths of a weight's rows.

    Attributes:
        weight: [o].
        base_squares: ‖w‖² of the base's rows, float32 [o]; None until they are loaded. Not a
            buffer, because DeepSpeed casts those to 16 bits.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rows, device=device))
        self.base_squares: Tensor | None = None

    @torch.no_grad()
    def measure(self, matrix: Tensor, layer: str) -> None:
        """Take the lengths of the rows of a loaded base weight [o, h]: B is zero.

        Raises:
            UserError: a row is zero.
        """
        squares = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32).square()
        if zeros := zero_rows(squares):
            raise UserError(
                f"{zeros} of the {len(matrix)} rows of {layer} are zero, so they have no direction",
                where="method.kind",
                fix="kind: lora, or target_modules without that layer",
            )
        self.base_squares = squares
        self.weight.copy_(squares.sqrt())

    @torch.no_grad()
    def norms(self, matrix: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The lengths of the rows of W + s B A, float32 [o].

        Args:
            matrix: W [o, h] in the dtype that computes; a, b: [r, h] and [o, r].
        """
        assert self.base_squares is not None, "the base is not loaded"
        a, b = a.float(), b.float()
        cross = matmul.linear(a.to(matrix.dtype), matrix).float()
        squares = (cross.mul_(2 * scale).t() + (b @ (a @ a.t())).mul_(scale * scale)).mul_(b).sum(1)
        return squares.add_(self.base_squares).clamp_min_(0).sqrt_()


def zero_rows(squares: Tensor) -> int:
    """How many rows have the length zero."""
    return int((squares == 0).sum())


def scale_outputs(product: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """g ∘ z + bias, written over z.

    Backward saves the result, which what follows saves too in most places, and not z.

    Args:
        product: z [T, o].
        gain: g [o], float32.
        bias: [o], frozen.
    """
    result: Tensor = _ScaleOutputs.apply(product, gain, bias)
    return result


class _ScaleOutputs(torch.autograd.Function):
    """y = g z + b; dz = g dy, dg = Σ dy z with z = (y - b) / g."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.mark_dirty(product)
        product.mul_(gain)
        if bias is not None:
            product.add_(bias)
        ctx.save_for_backward(product, gain, bias)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        result, gain, bias = ctx.saved_tensors
        sums = (gradient * result).sum(0, dtype=torch.float32)
        if bias is not None:
            sums -= gradient.sum(0, dtype=torch.float32) * bias
        return (gradient * gain).to(gradient.dtype), sums / gain, None


class DoraVariant(LoraVariant):
    """DoRA in PEFT's forward, for layers without a kernel."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale, base = module.scaling[active_adapter], module.get_base_layer()
        magnitude: Magnitude = module.lora_magnitude_vector[active_adapter]
        with torch.autocast(x.device.type, enabled=False):
            norms = magnitude.norms(base_matrix(base), a.weight, b.weight, scale)
        gain = magnitude.weight.float() / norms
        low_rank = b(a(module.lora_dropout[active_adapter](x)))
        product = result if base.bias is None else result - base.bias
        return result + (gain - 1) * product + (gain * scale) * low_rank


def add_magnitude(layer: Any, adapter: str) -> None:
    """Turn a LoRA layer into a DoRA layer, with PEFT's names of its parameters.

    Raises:
        UserError: it is not a linear layer.
    """
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear | Conv1D):
        raise UserError(
            f"DoRA adapts linear layers, and this is a {type(base).__name__}",
            where="method.target_modules",
            fix="name linear layers only, or kind: lora",
        )
    device = layer.lora_A[adapter].weight.device
    layer.lora_magnitude_vector[adapter] = Magnitude(layer.out_features, device)
    layer.lora_variant[adapter] = DoraVariant()


def magnitude_of(layer: LoraLayer, adapter: str) -> Magnitude | None:
    """A layer's magnitude; None if it is a plain LoRA layer."""
    if not isinstance(layer.lora_variant.get(adapter), DoraVariant):
        return None
    magnitude = layer.lora_magnitude_vector[adapter]
    assert isinstance(magnitude, Magnitude)
    return magnitude


def base_matrix(base: Any) -> Tensor:
    """The weight [o, h] of a base layer; an NF4 weight is dequantized."""
    if isinstance(base, Linear4bit):
        return dequantized(base.weight, quantization_state(base))
    weight: Tensor = base.weight.t() if isinstance(base, Conv1D) else base.weight
    return weight
