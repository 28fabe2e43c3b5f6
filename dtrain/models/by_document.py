"""Layers with a state along the sequence, computed one document of a packed sequence at a time.

Gated delta nets, Mamba, lightning attention and short convolutions carry a state from token to
token. transformers restarts it only where their kernels for GPUs take the boundaries, so a document
of a packed sequence would be computed with what is left of the one before. Here such a layer is
called for each document by itself. `probe_packing` checks the result. T is the number of tokens of
a sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import getclosurevars, unwrap
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import hub_kernels

from dtrain.models.attention import known_document_lengths
from dtrain.models.dropout import shared_key
from dtrain.models.expert_layers import own_experts, router_layers
from dtrain.models.meta_model import using_packages

KEEPS_STATE = "set_linear_cache"  # method of transformers' caches, called by such layers
LENGTHS = "document_lengths"  # attribute: those of a layer's last training pass
# What `loss` passes to flash attention: documents of the whole sequence.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def separate_states(model: nn.Module) -> None:
    """Let every layer with a state compute documents one by one, in evaluation mode.

    In training mode mamba-ssm's kernels multiply with the weights of linear layers without calling
    them: an adapter would have no effect, and a weight in NF4 would be taken for numbers.
    """
    for module in list(model.modules()):
        if has_state(module):
            module.forward = partial(_each_document, module, module.forward)
            module.training = False
            module.train = partial(_train_inside, module)  # type: ignore[method-assign]


def skip_hooks_of_experts(model: nn.Module) -> None:
    """Let experts that code of the model's own computes call the layers inside without hooks."""
    for name in set(own_experts(model)) - router_layers(model):
        module = model.get_submodule(name)
        if any(True for _ in module.children()):
            module.forward = partial(_without_inner_hooks, module, module.forward)


def _without_inner_hooks(
    module: nn.Module, forward: Callable[..., Any], *inputs: Any, **more: Any
) -> Any:
    with without_hooks(module):
        return forward(*inputs, **more)


def _train_inside(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of a layer with a state: sets the mode of the layers inside of it."""
    for child in module.children():
        child.train(mode)
    return module


def has_state(module: nn.Module) -> bool:
    """Whether a module convolves along the sequence, or keeps a state of linear attention."""
    if isinstance(module, PreTrainedModel):
        return False
    convolves = any(
        isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module.children()
    )
    code = getattr(type(module).forward, "__code__", None)
    return convolves or (code is not None and KEEPS_STATE in code.co_names)


def missing_packages(model: nn.Module) -> list[str]:
    """Packages that would compute layers with a state fast on a GPU, and are not installed.

    transformers says so once, while it is silenced.
    """
    found = set()
    for kind in {type(module) for module in model.modules() if has_state(module)}:
        forward: Any = unwrap(kind.forward)
        for name in forward.__code__.co_names:
            if isinstance(function := forward.__globals__.get(name), FunctionType):
                chosen = getclosurevars(function).nonlocals  # by transformers' decorator
                if chosen.get("is_new_implementation") is False:
                    found.add(chosen["package"])
    names = getattr(hub_kernels, "_PACKAGE_TO_DISTRIBUTION", {})
    return sorted(names.get(package, package).replace("_", "-") for package in found)


def _each_document(
    module: nn.Module, forward: Callable[..., Any], hidden_states: Tensor, *rest: Any, **more: Any
) -> Any:
    lengths = _lengths(module, hidden_states)
    more = {name: value for name, value in more.items() if name not in BOUNDARIES}
    outputs, key = [], shared_key(module)
    with without_hooks(module), using_packages(on=_is_on_gpu(hidden_states)):
        for start, stop in pairwise(accumulate(lengths, initial=0)):
            key.part = slice(start, stop)
            cut = partial(_cut, key.part, sum(lengths))
            inputs = (cut(hidden_states), *map(cut, rest))
            outputs.append(forward(*inputs, **{name: cut(value) for name, value in more.items()}))
    key.part = None
    return _join(outputs)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Call the layers inside of a module without their hooks.

    ZeRO-3 gathers the weights of a decoder layer as a whole. The hooks of layers inside would make
    ranks wait for one another once a document, or once an expert that has tokens, of which each
    rank has another number.
    """
    inner = [child for child in module.modules() if child is not module]
    hooks = [(child._forward_pre_hooks, child._forward_hooks) for child in inner]
    for child in inner:
        child._forward_pre_hooks, child._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for child, (before, after) in zip(inner, hooks, strict=True):
            child._forward_pre_hooks, child._forward_hooks = before, after


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _lengths(module: nn.Module, hidden_states: Tensor) -> Sequence[int]:
    """Tokens of each document; when activations are recomputed, those of the pass before.

    Recomputation has a gradient. Without one it is generation, where a sequence is one document.
    """
    lengths = known_document_lengths(hidden_states[..., 0])
    if not torch.is_grad_enabled():
        return lengths or (hidden_states.shape[1],)
    if lengths is None:
        lengths = getattr(module, LENGTHS, (hidden_states.shape[1],))
        assert sum(lengths) == hidden_states.shape[1], "recomputed with other documents"
    setattr(module, LENGTHS, lengths)
    return lengths


def _cut(part: slice, tokens: int, value: Any) -> Any:
    """What belongs to some tokens: of [1, T, …], of a mask [1, 1, T, T], or of a tuple of them."""
    if isinstance(value, tuple):
        return tuple(_cut(part, tokens, item) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.dim() == 4 and value.shape[2:] == (tokens, tokens):
        return value[:, :, part, part]
    return value[:, part] if value.shape[1] == tokens else value


def _join(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], tuple):
        return tuple(_join(list(items)) for items in zip(*outputs, strict=True))
    if len(outputs) == 1 or not isinstance(outputs[0], Tensor):
        return outputs[0]
    return torch.cat(outputs, dim=1)
