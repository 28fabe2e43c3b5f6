"""Compiling what a GPU runs in one pass before the first step, by the calls of a step.

Later it would take one rank seconds in the middle of a step, in which the others wait.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtrain.models.kernels import compiled
from dtrain.models.kernels.fused_cross_entropy import head_loss
from dtrain.models.kernels.lora_linear import Adapter, Layer, shared_input
from dtrain.models.kernels.rms_norm import rms_norm
from dtrain.models.kernels.swiglu import swiglu

TOKENS = (77, 2)  # sizes vary, but torch may compile small ones apart
WIDTH, INNER, VOCABULARY, RANK = 64, 96, 160, 8  # different, as torch takes equal ones for one

Draw = Callable[..., Tensor]


def compile_ahead(device: torch.device, dtype: torch.dtype, *, trains_base: bool) -> None:
    """Compute forward and backward of every kernel that is compiled, on a few random numbers.

    Args:
        dtype: what the model computes in.
        trains_base: whether the base's own weights train.
    """
    if not compiled.compiles(torch.empty(2, 2, device=device)):
        return

    def draw(*shape: int, trains: bool = True) -> Tensor:
        return torch.rand(shape, device=device, dtype=dtype).requires_grad_(trains)

    def weight(*shape: int) -> Tensor:
        return nn.Parameter(draw(*shape, trains=False), requires_grad=trains_base)

    for tokens in TOKENS:
        for learns in (False, True):  # what precedes the first adapter learns nothing
            _norm(tokens, lambda *shape, learns=learns: draw(*shape, trains=learns), weight)
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
    head_loss(hidden, weight(VOCABULARY, WIDTH), None, targets)[0].backward()


def _dropout(tokens: int, draw: Draw) -> None:
    """An adapter with dropout, on an input that its layer makes again in backward."""
    gain = nn.Parameter(draw(WIDTH).detach(), requires_grad=False)
    x = rms_norm(draw(1, tokens, WIDTH), gain, 1e-5)
    adapter = Adapter(draw(RANK, WIDTH), draw(INNER, RANK), 1.0, 1.25)
    layer = Layer(draw(INNER, WIDTH).detach(), adapter=adapter)
    kept = torch.ones_like(x, dtype=torch.bool)
    (result,) = shared_input(x, [layer], [kept])
    result.backward(torch.ones_like(result))
