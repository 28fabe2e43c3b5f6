"""A base whose weights hold NaN or infinity is refused when it is loaded, by tensor and file.

It would otherwise be found at the first loss, on all ranks of a cluster, without its cause; packed
into 4 bits, NaN even becomes an ordinary number.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dtrain.core.errors import Exit, UserError
from dtrain.core.weight_files import weight_files
from dtrain.distributed.tensor_utils import all_finite

CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_finite(folder: Path, model: nn.Module, *, packed: bool) -> None:
    """Check the parameters of a model that was loaded from a folder.

    Args:
        packed: some are not in memory as they are in the files, which are then read once more.

    Raises:
        UserError: a weight is not finite.
    """
    if not packed and all(_is_finite(parameter) for parameter in model.parameters()):
        return
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                check_tensor(file.get_tensor(name), name, path)
    if not packed:
        message = "a weight is too large for model.dtype"
        raise UserError(message, where=str(folder), fix="model.dtype=float32")


def check_tensor(values: Tensor, name: str, path: Path) -> None:
    """Check a tensor of a base's file, on any device.

    Raises:
        UserError: it holds NaN or infinity.
    """
    if not _is_finite(values):
        raise UserError(
            f"{name} contains NaN or infinity",
            where=str(path),
            fix="download or save the model again",
            status=Exit.NON_FINITE,
        )


def _is_finite(values: Tensor) -> bool:
    return values.dtype not in CHECKED or values.is_meta or all_finite(values.detach())
