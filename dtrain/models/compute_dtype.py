"""Where autocast casts: not in what code of a model casts to float32 itself.

Such code computes the scores of experts, or the state of a gated delta net, in float32. Autocast
casts the factors of these products to 16 bits again, so that the model chooses other experts than
the merged model will, and than under DeepSpeed's engines, which use no autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from dtrain.models.by_document import has_state
from dtrain.models.decoder_layers import decoder_layers
from dtrain.models.expert_layers import is_router

Forward = Callable[..., Any]


def limit_autocast(
    model: nn.Module, device: torch.device, dtype: torch.dtype, *, base_trains: bool = False
) -> None:
    """Let a model compute under autocast as the same model in `dtype` does without it.

    A frozen base is in `dtype`: only layers that train, in float32, compute under autocast. In a
    base that trains, all do but what needs other products than autocast's: layers with a state,
    and blocks that choose experts, some of which multiply with the router's weight themselves.
    Layers with a state and routers that train get their weights as they are in `dtype`.

    Args:
        model: PEFT's or transformers', before it is wrapped; it is changed in place.
        dtype: of 16 bits.
        base_trains: the base's parameters are float32.
    """
    base = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    kind, kept = device.type, kept_dtypes(base, dtype)
    blocks = _choosing_blocks(base) if base_trains else [base]
    inside = {module for block in blocks for module in block.modules()}
    for name, module in list(base.named_modules()):
        if is_router(module) or (base_trains and has_state(module)):
            if base_trains or any(p.requires_grad for p in module.parameters()):
                names = [leaf for leaf, _ in module.named_parameters()]
                dtypes = {leaf: kept.get(f"{name}.{leaf}", dtype) for leaf in names}
                _wrap(module, partial(_cast, module, module.forward, kind, dtype, dtypes))
        elif module in inside and _trains_itself(module):
            _wrap(module, partial(_autocast, module.forward, kind, dtype))
    for block in blocks:
        _wrap(block, partial(_cast, block, block.forward, kind, dtype, {}))


def _wrap(module: nn.Module, forward: partial[Any]) -> None:
    """Replace a module's forward by one that still shows its arguments, such as logits_to_keep."""
    module.forward = update_wrapper(forward, module.forward)


def kept_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes of tensors that transformers loads in another dtype than `dtype`, by name."""
    dtypes = model._get_dtype_plan(dtype)
    if not dtypes:
        return {}
    pattern, by_group, _ = build_glob_alternation(list(dtypes))
    return {
        name: dtypes[by_group[str(match.lastgroup)]]
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and (match := pattern.search(name))
    }


def _choosing_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules with a router and experts, but for decoder layers that hold both."""
    names = {n.rpartition(".")[0] for n, m in model.named_modules() if is_router(m)}
    layers = decoder_layers(model)
    return [block for block in map(model.get_submodule, names) if block not in layers]


def _trains_itself(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT, or has parameters of its own that train."""
    own = module.parameters(recurse=False)
    return isinstance(module, BaseTunerLayer) or any(p.requires_grad for p in own)


def _autocast(forward: Forward, kind: str, dtype: torch.dtype, *args: Any, **named: Any) -> Any:
    with torch.autocast(kind, dtype):
        return forward(*args, **named)


def _cast(
    module: nn.Module,
    forward: Forward,
    kind: str,
    dtype: torch.dtype,
    dtypes: dict[str, torch.dtype],
    *args: Any,
    **named: Any,
) -> Any:
    """Compute with float32 inputs cast to `dtype`, and parameters to those of `dtypes`."""
    args = _narrow(args, dtype)
    named = {name: _narrow(value, dtype) for name, value in named.items()}
    weights = {name: module.get_parameter(name).to(own) for name, own in dtypes.items()}
    with torch.autocast(kind, enabled=False), _reparametrize_module(module, weights):
        return forward(*args, **named)


def _narrow(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or a tuple of them, with float32 cast to `dtype`; a cache stays the same object."""
    if type(value) is tuple:
        return tuple(_narrow(item, dtype) for item in value)
    narrows = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.to(dtype) if narrows else value
