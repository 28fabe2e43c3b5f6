"""How many parameters a model has, and how many train, whatever form its base is stored in."""

from __future__ import annotations

from math import prod

from torch import nn

from dtrain.models.expert_nf4 import expert_states


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Count trainable and all parameters.

    Call it before an engine shards the model.
    """
    elements = parameter_elements(model)
    return sum(n for p, n in elements.items() if p.requires_grad), sum(elements.values())


def parameter_elements(model: nn.Module) -> dict[nn.Parameter, int]:
    """Elements of each parameter, of one packed in 4 bits the original ones."""
    elements = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = expert_states(module, name) or getattr(parameter, "quant_state", None)
            if packed is not None:
                elements[parameter] = prod(packed.shape)
            else:  # empty under ZeRO-3
                elements[parameter] = int(getattr(parameter, "ds_numel", parameter.numel()))
    return elements
