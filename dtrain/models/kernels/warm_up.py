"""Compiles the GPU kernels before the first step, by running each of them once.

During a step, compiling would take one rank seconds while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtrain.models.kernels import compiled
from dtrain.models.kernels.elementwise import rms_norm, swiglu
from dtrain.models.kernels.fused_cross_entropy import fused_cross_entropy
from dtrain.models.kernels.lora_linear import FrozenLinear, LoraWeights, shared_input_linears

TOKENS = (77, 2)  # torch may specialize small sizes
WIDTH, INNER, VOCABULARY, RANK = (
    64,
    96,
    160,
    8,
)  # torch would treat equal sizes as one

Draw = Callable[..., Tensor]


def compile_ahead(device: torch.device, dtype: torch.dtype, *, trains_base: bool) -> None:
    """Run forward and backward of every compiled kernel on small random tensors.

    Args:
        dtype: the dtype that the model computes in.
        trains_base: whether the base's own weights train.
    """
    if not compiled.should_compile(torch.empty(2, 2, device=device)):
        return

    def draw(*shape: int, trains: bool = True) -> Tensor:
        return torch.rand(shape, device=device, dtype=dtype).requires_grad_(trains)

    def weight(*shape: int) -> Tensor:
        return nn.Parameter(draw(*shape, trains=False), requires_grad=trains_base)

    for tokens in TOKENS:
        for trains in (False, True):  # no gradient reaches the norm before the first adapter
            _norm(tokens, lambda *shape, trains=trains: draw(*shape, trains=trains), weight)
        _mlp(tokens, draw)
        _loss(tokens, draw, weight)
        _dropout(tokens, draw)


def _norm(tokens: int, draw: Draw, weight: Draw) -> None:
    result = rms_norm(draw(1, tokens, WIDTH), weight(WIDTH), 1e-5)
    if result.requires_grad:
        result.backward(torch.ones_like(result))


def _mlp(tokens: int, draw: Draw) -> None:
    result = swiglu(draw(1, tokens, INNER), draw(1, tokens, INNER))
    result.backward(torch.ones_like(result))


def _loss(tokens: int, draw: Draw, weight: Draw) -> None:
    hidden = draw(tokens, WIDTH)
    targets = torch.zeros(tokens, dtype=torch.int64, device=hidden.device)
    fused_cross_entropy(hidden, weight(VOCABULARY, WIDTH), None, targets)[0].backward()


def _dropout(tokens: int, draw: Draw) -> None:
    """An adapter with dropout, whose input is recomputed in backward."""
    gain = nn.Parameter(draw(WIDTH).detach(), requires_grad=False)
    x = rms_norm(draw(1, tokens, WIDTH), gain, 1e-5)
    adapter = LoraWeights(draw(RANK, WIDTH), draw(INNER, RANK), 1.0, 1.25)
    layer = FrozenLinear(draw(INNER, WIDTH).detach(), adapter=adapter)
    kept = torch.ones_like(x, dtype=torch.bool)
    (result,) = shared_input_linears(x, [layer], [kept])
    result.backward(torch.ones_like(result))
