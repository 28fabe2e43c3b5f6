"""A base tensor as a 4-bit base computed with it: quantized and dequantized in blocks of rows.

Beyond a block this needs 0.57 bytes an element: double quantization needs every block's scale at
once, so a tensor is quantized whole before its first row is dequantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

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
from dtrain.merge.base_tensors import FLOATS, BaseTensors
from dtrain.models.expert_layers import expert_parameters
from dtrain.models.load import read_config
from dtrain.models.meta_model import build_meta_model, unused_parameters
from dtrain.models.quantize import nf4_layers, pack_natively

CPU = torch.device("cpu")
SCALES_BLOCK = 256  # of bitsandbytes' double quantization


class Nf4Base:
    """The tensors of a base that were kept in NF4 for training.

    A GPU occasionally quantizes the same weights to other bits: bitsandbytes' kernel is compiled
    with approximate division, and the mean of the scales is summed in another order.

    Args:
        dtype: that the base was loaded in; None: each tensor as it is stored.
        device: where the base was quantized for training.

    Raises:
        UserError: one of the tensors is not a plain float in the base.
    """

    def __init__(
        self,
        base: BaseTensors,
        dtype: torch.dtype | None,
        trust_remote_code: bool = False,
        device: torch.device = CPU,
    ) -> None:
        config = read_config(base.folder, trust_remote_code=trust_remote_code)
        self.names: set[str] = set()
        self.dtype, self.device = dtype, device
        pack_natively()
        loaded_in = str(dtype or "as stored").removeprefix("torch.")
        self.description = {"quantization": "nf4", "loaded_in": loaded_in}
        if device != CPU:
            self.description["quantized_on"] = device.type
        model = build_meta_model(config, trust_remote_code)
        for layer in sorted(nf4_layers(model)):
            self._add(base, layer, base.stored_name(f"{layer}.weight"))
        # Experts that no text reaches are packed too, but not computed with: they stay as they are.
        for parameter in sorted(expert_parameters(model).keys() - unused_parameters(model)):
            parts = base.expert_parts.get(parameter)
            stored = [part.name for part in parts] if parts else [base.stored_name(parameter)]
            for name in stored:
                self._add(base, parameter, name)

    def _add(self, base: BaseTensors, layer: str, name: str | None) -> None:
        if name is None or base[name][0] not in FLOATS:
            message = f"{layer} was in NF4, but the base has no plain float weight of it"
            raise UserError(message, where=str(base.folder))
        self.names.add(name)

    def dequantized(self, blocks: Iterator[Tensor], stored: torch.dtype) -> Iterator[Tensor]:
        """Yield blocks of rows as the 4-bit base computes with them, in float32.

        Args:
            blocks: of a multiple of 64 rows except the last, so that no NF4 block of 64 elements
                spans two of them.
            stored: dtype of the base's file.
        """
        first = next(blocks, None)
        if first is None:
            return
        blocks = chain([first], blocks)
        if first.dim() == 3:  # experts, each quantized by itself
            for expert in chain.from_iterable(blocks):
                yield next(self._rounded(iter([expert]), stored)).unsqueeze(0)
            return
        yield from self._rounded(blocks, stored)

    def _rounded(self, blocks: Iterator[Tensor], stored: torch.dtype) -> Iterator[Tensor]:
        """As `dequantized`, of one matrix."""
        dtype = self.dtype or stored
        loaded = (block.to(stored).to(dtype).to(self.device) for block in blocks)
        quantized = [quantize_4bit(block, quant_type="nf4") for block in loaded]
        scales = torch.cat([state.absmax for _, state in quantized])
        offset = scales.mean()
        codes, outer = quantize_blockwise(scales - offset, blocksize=SCALES_BLOCK)
        scales = dequantize_blockwise(codes, outer) + offset
        start = 0
        for bits, state in quantized:
            stop = start + state.absmax.numel()
            yield _dequantize(bits, state, scales[start:stop]).cpu()
            start = stop


def _dequantize(bits: Tensor, state: QuantState, scales: Tensor) -> Tensor:
    state.absmax = scales.float()
    return dequantize_4bit(bits, state, quant_type="nf4").float()
