"""Experts in NF4: each stored matrix of each expert is quantized by itself, as bitsandbytes does.

A parameter [E, rows, columns] becomes one [E, n] of packed numbers in the compute dtype, which
engines shard like any other; the scales of its matrices stay with the module, whole on every rank,
as those of bitsandbytes' layers do. Where the files store gate and up of an expert apart, they are
quantized apart, so that a merge can repeat it tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from torch import Tensor, nn

from dtrain.models.quantize import PER_FLOAT, dequantized, not_nf4

STATES = "nf4_states"  # attribute of an experts module: parameter → its `ExpertStates`


@dataclass(frozen=True)
class ExpertStates:
    """The quantization states of a packed parameter.

    Attributes:
        shape: of the parameter, [E, rows, columns].
        by_expert: the states of each expert's matrices, which follow one another by rows.
    """

    shape: tuple[int, ...]
    by_expert: list[list[QuantState]]

    def matrix(self, packed: Tensor, expert: int) -> Tensor:
        """An expert's matrix [rows, columns].

        Args:
            packed: [E, n].
        """
        states = self.by_expert[expert]
        chunks = packed[expert].chunk(len(states))
        matrices = [dequantized(c, s) for c, s in zip(chunks, states, strict=True)]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def pack_experts(
    values: Tensor, matrices: int, storage: torch.dtype
) -> tuple[Tensor, ExpertStates]:
    """Quantize a parameter of experts.

    Args:
        values: [E, rows, columns].
        matrices: into how many equal ranges of rows each expert is divided.
        storage: dtype of the packed numbers.

    Returns:
        [E, n], and the states.
    """
    packed, by_expert = [], []
    for expert in values:
        parts = [
            quantize_4bit(
                part.contiguous(),
                compress_statistics=True,
                quant_type="nf4",
                quant_storage=storage,
            )
            for part in expert.chunk(matrices)
        ]
        packed.append(torch.cat([bits.flatten() for bits, _ in parts]))
        by_expert.append([state for _, state in parts])
    return torch.stack(packed), ExpertStates(tuple(values.shape), by_expert)


def packed_parameter(
    module: nn.Module, name: str, values: Tensor, matrices: int, storage: torch.dtype
) -> nn.Parameter:
    """Quantize a parameter of an experts module, which keeps its states."""
    packed, states = pack_experts(values, matrices, storage)
    getattr(module, STATES)[name] = states
    return nn.Parameter(packed, requires_grad=False)


def mark_experts(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Let the parameters of experts be packed when they are loaded.

    Args:
        parameters: by name, [E, rows, columns] each.

    Raises:
        UserError: a matrix does not fill whole floats.
    """
    for name, values in parameters.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if values[0].numel() % (2 * PER_FLOAT):
            raise not_nf4(name, type(module).__name__, list(values.shape))
        if not hasattr(module, STATES):
            setattr(module, STATES, {})


def unpack_experts(model: nn.Module) -> None:
    """Hold packed experts with the values that NF4 left of them in plain parameters again.

    PEFT's adapters of parameters add to these values.
    """
    for module in model.modules():
        for name, states in vars(module).pop(STATES, {}).items():
            packed = getattr(module, name)
            values = torch.stack([states.matrix(packed, e) for e in range(len(packed))])
            setattr(module, name, nn.Parameter(values, requires_grad=False))


def holds_nf4(module: nn.Module) -> bool:
    """Whether a module's experts are packed."""
    return hasattr(module, STATES)


def packed_parameters(module: nn.Module) -> list[str]:
    """Names of a module's parameters that are packed, or will be when they are loaded."""
    states = vars(module).get(STATES)
    if states is None:
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, values in own if values.dim() == 3 or name in states]


def expert_states(module: nn.Module, name: str) -> ExpertStates | None:
    """The states of a packed parameter; None if it is not packed."""
    states: dict[str, Any] = getattr(module, STATES, {})
    return states.get(name)
