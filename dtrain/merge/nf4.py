"""A base tensor as a 4-bit base computed with it: packed and unpacked again, in row blocks.

Beyond a block it needs 0.57 bytes an element: double quantisation wants every block's scale at
once, so a tensor is packed whole before its first row is unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.merge.tied_weights import FLOATS, Shapes
from dtrain.models.kernels.nf4_pack import pack_fast
from dtrain.models.load import read_config
from dtrain.models.outline import outline
from dtrain.models.quantize import nf4_layers

CPU = torch.device("cpu")
SCALES_BLOCK = 256  # of bitsandbytes' double quantisation


class Packed:
    """Which tensors of a base were held in NF4 for training, and in which dtype it was loaded.

    A GPU packs the same weights into other bits now and then: bitsandbytes' kernel is compiled
    with approximate division, and the mean of the scales is summed in another order.

    Args:
        dtype: None: as each tensor is stored.
        device: where the base was packed for training.

    Raises:
        UserError: one of them is not a plain float in the base.
    """

    def __init__(
        self,
        base: Path,
        shapes: Shapes,
        dtype: torch.dtype | None,
        trust_remote_code: bool = False,
        device: torch.device = CPU,
    ) -> None:
        config = read_config(base, trust_remote_code=trust_remote_code)
        layers = nf4_layers(outline(config, trust_remote_code))
        self.names = set()
        self.dtype, self.device = dtype, device
        pack_fast()
        self.about = {"form": "nf4", "loaded_in": str(dtype or "as stored").removeprefix("torch.")}
        if device != CPU:
            self.about["packed_on"] = device.type
        for layer in sorted(layers):
            name = shapes.stored_name(f"{layer}.weight")
            if name is None or shapes[name][0] not in FLOATS:
                raise UserError(f"no plain {layer}, which was held in NF4", where=str(base))
            self.names.add(name)

    def unpacked(self, blocks: Iterator[Tensor], stored: torch.dtype) -> Iterator[Tensor]:
        """Blocks of rows as the 4-bit base computes with them, in float32.

        Args:
            blocks: of a multiple of 64 rows, the last one excepted, so that NF4's blocks of 64
                elements never lie across two of them.
            stored: dtype of the base's file.
        """
        dtype = self.dtype or stored
        loaded = (block.to(stored).to(dtype).to(self.device) for block in blocks)
        packed = [quantize_4bit(block, quant_type="nf4") for block in loaded]
        scales = torch.cat([state.absmax for _, state in packed])
        offset = scales.mean()
        codes, outer = quantize_blockwise(scales - offset, blocksize=SCALES_BLOCK)
        scales = dequantize_blockwise(codes, outer) + offset
        at = 0
        for bits, state in packed:
            count = state.absmax.numel()
            yield _unpacked(bits, state, scales[at : at + count]).cpu()
            at += count


def _unpacked(bits: Tensor, state: QuantState, scales: Tensor) -> Tensor:
    state.absmax = scales.float()
    return dequantize_4bit(bits, state, quant_type="nf4").float()
