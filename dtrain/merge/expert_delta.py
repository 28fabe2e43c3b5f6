"""What LoRA adds to the experts of a layer, by the tensors that they are stored as.

PEFT's matrices of a parameter [E, out, in]: A is [E r, in], with the rows of one expert after those
of another; B is [out, r E], where the columns of expert e are every E-th from e on.

Letters: E experts, r rank, in and out sizes of an expert's layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dtrain.merge.weight_delta import BlockUpdate, ReadTensor


@dataclass(frozen=True)
class ExpertDelta:
    """The change of one stored tensor.

    Attributes:
        keys: the adapter's keys of A and B, by the roles a and b.
        r: rank of an expert.
        scale: factor of B·A.
        experts: E.
        expert: number of the expert; None if the tensor holds all of them, [E, out, in].
        first_row: row of the expert's matrix that is the first of the stored tensor.
        transposed: each expert is stored as [in, out].
    """

    keys: Mapping[str, str]
    r: int
    scale: float
    experts: int
    expert: int | None = None
    first_row: int = 0
    transposed: bool = False

    @property
    def needs_all_rows(self) -> bool:
        """Whether all rows are needed at once: never."""
        return False

    def block_update(self, read: ReadTensor, weight: float = 1.0) -> BlockUpdate:
        """Return the function that changes blocks of rows, or of experts, of the tensor.

        Args:
            weight: factor of what is added.
        """
        a = read(self.keys["a"]).view(self.experts, self.r, -1)
        b = read(self.keys["b"])
        b = b.view(len(b), self.r, self.experts).permute(2, 0, 1)  # [E, out, r]
        scale = self.scale * weight
        if self.expert is None:
            return partial(_add_to_experts, a, b, scale, self.transposed)
        return partial(_add_to_rows, a[self.expert], b[self.expert, self.first_row :], scale)


def _add_to_rows(a: Tensor, b: Tensor, scale: float, old: Tensor, row: int) -> Tensor:
    return (b[row : row + len(old)] @ a).mul_(scale).add_(old)


def _add_to_experts(
    a: Tensor, b: Tensor, scale: float, transposed: bool, old: Tensor, first: int
) -> Tensor:
    """Change experts from number `first` on, one at a time."""
    new = old.float().clone()
    for index, values in enumerate(new):
        delta = b[first + index] @ a[first + index]
        values.add_(delta.T if transposed else delta, alpha=scale)
    return new
