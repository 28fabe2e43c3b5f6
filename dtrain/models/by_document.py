"""Layers with a state along the sequence, computed one document of a packed sequence at a time.

Gated delta nets, Mamba, lightning attention and short convolutions carry a state from token to
token. transformers restarts it only where their kernels for GPUs take the boundaries, so a document
of a packed sequence would be computed with what is left of the one before. Here such a layer is
called for each document by itself; on a GPU for the whole sequence, if a probe showed that it
separates documents by their boundaries. `probe_packing` checks the result. T is the number of
tokens of a sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from inspect import getclosurevars, unwrap
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.integrations import hub_kernels

from dtrain.core.errors import first_line
from dtrain.core.log import say
from dtrain.distributed.out_of_memory import is_out_of_memory
from dtrain.distributed.tensor_utils import send
from dtrain.models.attention import known_document_lengths
from dtrain.models.dropout import shared_key
from dtrain.models.expert_layers import own_experts, router_layers
from dtrain.models.meta_model import using_packages

KEEPS_STATE = "set_linear_cache"  # method of transformers' caches, called by such layers
LENGTHS = "document_lengths"  # attribute: those of a layer's last training pass
# What `loss` passes to flash attention: documents of the whole sequence.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PROBE_LENGTHS = (5, 300, 61)  # tokens of the documents of a probe: kernels' chunks are 256


def separate_states(model: nn.Module) -> None:
    """Let every layer with a state compute documents one by one, in evaluation mode.

    In training mode mamba-ssm's kernels multiply with the weights of linear layers without calling
    them: an adapter would have no effect, and a weight in NF4 would be taken for numbers.
    """
    separates: dict[type, bool] = {}  # what the probe of a class found
    for module in list(model.modules()):
        if has_state(module):
            module.forward = partial(_each_document, module, module.forward, separates)
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
    module: nn.Module,
    forward: Callable[..., Any],
    separates: dict[type, bool],
    hidden_states: Tensor,
    *rest: Any,
    **more: Any,
) -> Any:
    lengths = _lengths(module, hidden_states)
    more = {name: value for name, value in more.items() if name not in BOUNDARIES}
    with without_hooks(module), using_packages(on=_is_on_gpu(hidden_states)):
        if len(lengths) > 1 and _is_on_gpu(hidden_states):
            if type(module) not in separates:
                separates[type(module)] = _probe(module, forward, hidden_states, rest, more)
            if separates[type(module)]:
                more |= _boundaries(tuple(lengths), hidden_states.device)
                return forward(hidden_states, *rest, **more)
        return _one_by_one(module, forward, lengths, hidden_states, *rest, **more)


def _one_by_one(
    module: nn.Module,
    forward: Callable[..., Any],
    lengths: Sequence[int],
    hidden_states: Tensor,
    *rest: Any,
    **more: Any,
) -> Any:
    outputs, key = [], shared_key(module)
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        key.part = slice(start, stop)
        cut = partial(_cut, key.part, sum(lengths))
        inputs = (cut(hidden_states), *map(cut, rest))
        outputs.append(forward(*inputs, **{name: cut(value) for name, value in more.items()}))
    key.part = None
    return _join(outputs)


@lru_cache(maxsize=2)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """What transformers passes on to kernels: ends of documents, and the document of each token.

    All layers get the same tensors: flash-linear-attention waits for the device once for each.
    """
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    documents = torch.arange(len(lengths), dtype=torch.int32)
    index = documents.repeat_interleave(torch.tensor(lengths))[None]
    return {"cu_seq_lens_q": send(ends, device), "seq_idx": send(index, device)}


def _probe(
    module: nn.Module,
    forward: Callable[..., Any],
    like: Tensor,
    rest: tuple[Any, ...],
    more: dict[str, Any],
) -> bool:
    """Whether a layer separates the documents of a whole row by their boundaries; says so."""
    reason = "it mixes documents of a whole sequence"
    key = shared_key(module)
    sequences, key.lengths = key.lengths, []  # no dropout
    try:
        if any(isinstance(value, (Tensor, tuple)) for value in (*rest, *more.values())):
            separates, reason = False, "it takes more than hidden states"
        else:
            # without hooks: activation checkpointing would count, and recompute, what is saved
            with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
                separates = _separates(module, partial(_call, forward, rest, more), like)
    except Exception as error:  # a package's code may raise anything
        if is_out_of_memory(error):
            raise
        separates, reason = False, first_line(error)
    finally:
        key.lengths, key.part = sequences, None
    way = "whole" if separates else f"document by document: {reason}"
    say(f"{type(module).__name__} computes packed sequences {way}")
    return separates


def _call(
    forward: Callable[..., Any],
    rest: tuple[Any, ...],
    more: dict[str, Any],
    row: Tensor,
    **bounds: Tensor,
) -> Any:
    return forward(row, *rest, **more, **bounds)


def _separates(module: nn.Module, forward: Callable[..., Any], like: Tensor) -> bool:
    """Compare a random row computed whole with the same row computed document by document.

    Rounding hides what little a state may leave behind. So the last document must also be the same
    to the bit after other documents, and must pass back no gradient to them at all.
    """
    tokens, last = sum(PROBE_LENGTHS), sum(PROBE_LENGTHS[:-1])
    bounds = _boundaries(PROBE_LENGTHS, like.device)
    random = torch.Generator().manual_seed(1)
    row, others, weight = (
        torch.randn(1, tokens, like.shape[-1], generator=random).to(like) for _ in range(3)
    )
    others = torch.cat([others[:, :last], row[:, last:]], dim=1)
    row, others = row.requires_grad_(), others.requires_grad_()
    whole = _hidden(forward(row, **bounds))
    after_others = _hidden(forward(others, **bounds))
    (passed_back,) = torch.autograd.grad(after_others[:, last:], others, weight[:, last:])
    if not torch.equal(whole[:, last:], after_others[:, last:]) or passed_back[:, :last].any():
        return False
    learned = [row, *(p for p in module.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(whole, learned, weight, allow_unused=True)  # and frees its graph
    alone = _hidden(_one_by_one(module, forward, PROBE_LENGTHS, row))
    gradients = torch.autograd.grad(alone, learned, weight, allow_unused=True)
    return all(map(_agree, (whole, *expected), (alone, *gradients)))


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _agree(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two results differ by rounding only: by 4 units of 16 bits, or by tf32's."""
    if first is None or second is None:
        return first is second
    tolerance = max(4 * torch.finfo(first.dtype).eps, 1e-3)
    difference = (first.float() - second.float()).norm()
    return bool(difference <= tolerance * second.float().norm())


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
