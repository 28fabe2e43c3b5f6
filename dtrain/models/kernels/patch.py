"""Replaces modules of a model by kernels, where the model's own code computes the same.

transformers copies Llama's code into many models. A module whose forward is Llama's, instruction
for instruction, gets a kernel; any other keeps its own. The fused loss works for every model whose
forward returns the output layer's logits, or adjusts them token by token.

GPU kernels are compiled before the first step, by running each of them once: during a step,
compiling would take one rank seconds while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from dtrain.config import schema
from dtrain.models.kernels import compiled, native
from dtrain.models.kernels.elementwise import mlp_forward, norm_forward, rms_norm, rotary, swiglu
from dtrain.models.kernels.experts import has_packed_experts, route_adapters
from dtrain.models.kernels.fused_cross_entropy import FusedLossHead, fused_cross_entropy
from dtrain.models.kernels.lora_linear import (
    FrozenLinear,
    LoraWeights,
    SharedInputGroup,
    is_supported_linear,
    shared_input_linears,
)
from dtrain.models.kernels.output_probe import OutputProbe
from dtrain.models.kernels.same_program import runs_its_class, same_program

TOKENS = (77, 2)  # torch may specialize small sizes
WIDTH, INNER, VOCABULARY, RANK = (
    64,
    96,
    160,
    8,
)  # torch would treat equal sizes as one

Draw = Callable[..., Tensor]


def compile_ahead(device: torch.device, dtype: torch.dtype, *, trains_base: bool) -> None:
    """Run forward and backward of every compiled kernel on small random tensors.

    Args:
        dtype: the dtype that the model computes in.
        trains_base: whether the base's own weights train.
    """
    if not compiled.should_compile(torch.empty(2, 2, device=device)):
        return

    def draw(*shape: int, trains: bool = True) -> Tensor:
        return torch.rand(shape, device=device, dtype=dtype).requires_grad_(trains)

    def weight(*shape: int) -> Tensor:
        return nn.Parameter(draw(*shape, trains=False), requires_grad=trains_base)

    for tokens in TOKENS:
        for trains in (False, True):  # no gradient reaches the norm before the first adapter
            _norm(tokens, lambda *shape, trains=trains: draw(*shape, trains=trains), weight)
        _mlp(tokens, draw)
        _loss(tokens, draw, weight)
        _dropout(tokens, draw)


def _norm(tokens: int, draw: Draw, weight: Draw) -> None:
    result = rms_norm(draw(1, tokens, WIDTH), weight(WIDTH), 1e-5)
    if result.requires_grad:
        result.backward(torch.ones_like(result))


def _mlp(tokens: int, draw: Draw) -> None:
    result = swiglu(draw(1, tokens, INNER), draw(1, tokens, INNER))
    result.backward(torch.ones_like(result))


def _loss(tokens: int, draw: Draw, weight: Draw) -> None:
    hidden = draw(tokens, WIDTH)
    targets = torch.zeros(tokens, dtype=torch.int64, device=hidden.device)
    fused_cross_entropy(hidden, weight(VOCABULARY, WIDTH), None, targets)[0].backward()


def _dropout(tokens: int, draw: Draw) -> None:
    """An adapter with dropout, whose input is recomputed in backward."""
    gain = nn.Parameter(draw(WIDTH).detach(), requires_grad=False)
    x = rms_norm(draw(1, tokens, WIDTH), gain, 1e-5)
    adapter = LoraWeights(draw(RANK, WIDTH), draw(INNER, RANK), 1.0, 1.25)
    layer = FrozenLinear(draw(INNER, WIDTH).detach(), adapter=adapter)
    kept = torch.ones_like(x, dtype=torch.bool)
    (result,) = shared_input_linears(x, [layer], [kept])
    result.backward(torch.ones_like(result))


# Children that a module calls one after the other with the same input.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
KINDS = ("adapted layers", "norms", "MLPs", "rotary embeddings", "chunked loss")
EXPERTS = "experts"  # which few models have
_same = cache(same_program)  # a model has many modules of each class
ROTARY = ("apply_rotary_pos_emb", "rotate_half")


def apply_kernels(model: nn.Module, settings: schema.Model) -> str:
    """Replace modules by kernels, unless `model.kernels` is off.

    Args:
        model: a transformers model with its adapters, before an engine wraps it.

    Returns:
        A summary for the log: how many modules of each kind were replaced.
    """
    if settings.kernels == "off":
        packed = sum(route_adapters(m) for m in model.modules() if has_packed_experts(m))
        return "off, as the recipe says" + (f", but for {packed} experts in NF4" if packed else "")
    why = native.set_enabled(on=True)
    counts = patch_modules(model)
    if not counts:
        return "none: no module of this model computes as Llama's do"
    without = [kind for kind in KINDS if kind not in counts]
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    text += f"; not replaced: {', '.join(without)}" if without else ""
    return text + (f"; without the compiled loops: {why}" if why else "")


def patch_modules(model: nn.Module) -> dict[str, int]:
    """Replace every module that a kernel can; return how many there are of each kind."""
    counts = dict.fromkeys((*KINDS, EXPERTS), 0)
    for module in list(model.modules()):
        counts["adapted layers"] += _share_inputs(module)
        counts["norms"] += _replace_forward(module, llama.LlamaRMSNorm, norm_forward)
        if _is_silu(getattr(module, "act_fn", None)):
            counts["MLPs"] += _replace_forward(module, llama.LlamaMLP, mlp_forward)
        counts[EXPERTS] += route_adapters(module)
        counts["rotary embeddings"] += _replace_rotary(module)
    counts["chunked loss"] += _fuse_loss(model)
    return {kind: count for kind, count in counts.items() if count}


def _share_inputs(module: nn.Module) -> int:
    """Let `shared_input_linears` compute a module's adapted children; return their number."""
    fast = {name: child for name, child in module.named_children() if is_supported_linear(child)}
    groups: list[tuple[str, ...]] = [
        names for names in SHARED_INPUT if all(name in fast for name in names)
    ]
    grouped = {name for names in groups for name in names}
    groups += [(name,) for name in fast if name not in grouped]
    count = 0
    for names in groups:
        members = [fast[name] for name in names]
        if any(isinstance(member, LoraLayer) for member in members):
            SharedInputGroup(members)
            count += len(members)
    return count


def _replace_forward(
    module: nn.Module, known: type[nn.Module], forward: Callable[..., Any]
) -> bool:
    """Use `forward` if the module's own is that of the class `known`."""
    owner = type(module)
    fits = runs_its_class(module) and _same(owner.forward, known.forward, (owner, known))
    if fits:
        module.forward = partial(forward, module)
    return fits


def _is_silu(activation: Any) -> bool:
    return type(activation) in (nn.SiLU, SiLUActivation) and runs_its_class(activation)


def _replace_rotary(module: nn.Module) -> bool:
    """Run an attention's own forward with our rotary in place of transformers'."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or ROTARY[0] not in forward.__code__.co_names:
        return False
    names = forward.__globals__
    known = all(_same(names.get(name), getattr(llama, name)) for name in ROTARY)
    if not (known and runs_its_class(module)):
        return False
    ours = FunctionType(
        forward.__code__,
        {**names, ROTARY[0]: rotary},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(ours, module)
    return True


def _fuse_loss(model: nn.Module) -> bool:
    """Let the output layer compute the loss, if the logits follow from its output alone."""
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    head: Any = inner.get_output_embeddings() if inner is not None else None
    layer = head.token_adapter.base_layer if isinstance(head, TrainableTokensWrapper) else head
    if inner is None or type(layer) is not nn.Linear:
        return False
    plain = copy(inner)  # without what PEFT puts around a layer with trained rows
    plain._modules = {name: layer if m is head else m for name, m in inner._modules.items()}
    probe = OutputProbe(plain, layer)
    if probe.exact:
        FusedLossHead(inner, head, probe.transform)
    return probe.exact
