"""What each PEFT method adds to a base tensor, for a block of its rows, in PEFT's order of steps.

Letters: r rank, out and in a layer's sizes. A base weight lies as [out, in]; turned (GPT-2's
Conv1D, an embedding of `out` columns) as [in, out].

Row blocks of 64 rows and more give, to the bit, the rows of the whole product; smaller ones do not,
since they go through another BLAS kernel. Convolutions equal PEFT's to the bit if that computes on
one thread too: their last bit depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dtrain.models.kernels.merge_rounding import add_scaled

Read = Callable[[str], Tensor]  # a key of the adapter's file → the tensor, float32
# Old rows in any float, the first one's number → new rows, in float32; they hold until the next.
Step = Callable[[Tensor, int], Tensor]
ADALORA_EPSILON = 1e-5  # of peft's SVDLinear
CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


@dataclass(frozen=True)
class Layer:
    """One adapted tensor.

    Attributes:
        keys: the adapter's key of each role: a, b, and e (AdaLoRA), m (DoRA's magnitude); or bias.
        r: rank by the config; None if it does not say.
        scale: factor of B·A.
        ranks: AdaLoRA's divisor, the rank it began with.
        turned: the base tensor lies as [in, out].
        dims: of the base tensor.
    """

    keys: Mapping[str, str]
    r: int | None
    scale: float
    ranks: int | None = None
    turned: bool = False
    dims: int = 2

    @property
    def whole(self) -> bool:
        """Whether all rows are needed at once: a convolution, or norms of a turned tensor."""
        return self.dims > 2 or (self.turned and "m" in self.keys)

    def step(self, read: Read, weight: float = 1.0) -> Step:
        """What changes blocks of rows; the adapter's tensors are read once.

        Args:
            weight: factor of what is added.
        """
        parts = {role: read(key) for role, key in self.keys.items()}
        if "bias" in parts:
            return lambda old, at: (
                old.float() + _rows(parts["bias"] * (self.scale * weight), old, at)
            )
        a = parts["a"] * parts["e"] if "e" in parts else parts["a"]
        if not self.turned and self.dims == 2 and not {"e", "m"} & parts.keys():
            return partial(_added, a, parts["b"], self.scale * weight, [])

        def changed(old: Tensor, at: int) -> Tensor:
            old = old.float()
            delta = self._delta(a, parts["b"], old, at).mul_(self.scale * weight)
            if self.ranks is not None:
                delta.div_(torch.tensor([float(self.ranks)]) + ADALORA_EPSILON)
            if "m" not in parts:
                return delta.add_(old)
            magnitude = parts["m"].flatten()
            return self._dora(old, delta, magnitude if self.turned else _rows(magnitude, old, at))

        return changed

    def _delta(self, a: Tensor, b: Tensor, old: Tensor, at: int) -> Tensor:
        """B·A in the shape of `old`."""
        if self.dims > 2:
            return _convolved(a, b)
        if self.turned:
            return (b @ a[:, at : at + len(old)]).T
        return b[at : at + len(old)] @ a

    def _dora(self, old: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
        """Rows (turned: columns) brought to the lengths that were trained (arXiv:2402.09353)."""
        new = old + delta
        if self.turned:
            # PEFT takes the norm of the transposed matrix: the memory's order decides the last bit.
            return (magnitude / torch.linalg.norm(old.T + delta.T, dim=1)).view(1, -1) * new
        if self.dims == 2:
            return (magnitude / torch.linalg.norm(new, dim=1)).view(-1, 1) * new
        norm = new.norm(p=2, dim=tuple(range(1, self.dims)))
        return (magnitude / norm).view(-1, *[1] * (self.dims - 1)) * new


def _added(a: Tensor, b: Tensor, scale: float, room: list[Tensor], old: Tensor, at: int) -> Tensor:
    """Plain LoRA, nearly all of what is merged, in memory that the next block uses again."""
    if not room or room[0].numel() < old.numel():
        room[:] = [torch.empty(old.numel())]
    delta = torch.mm(b[at : at + len(old)], a, out=room[0][: old.numel()].view(old.shape))
    return add_scaled(old, delta, scale)


def _rows(values: Tensor, old: Tensor, at: int) -> Tensor:
    return values[at : at + len(old)]


def _convolved(a: Tensor, b: Tensor) -> Tensor:
    """The kernel that first A [r, in, ...], then B [out, r, 1, ...] amount to: [out, in, ...]."""
    if a.dim() == 4 and a.shape[2:] == (1, 1):
        return (b.flatten(1) @ a.flatten(1))[:, :, None, None]
    return CONVOLUTIONS[a.dim()](a.transpose(0, 1), b).transpose(0, 1).contiguous()
