"""Replaces modules of a model by kernels, where the model's own code computes the same.

transformers copies Llama's code into many models. A module whose forward is Llama's, instruction
for instruction, gets a kernel; any other keeps its own. The fused loss works for every model whose
forward returns the output layer's logits, or adjusts them token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from dtrain.config import schema
from dtrain.models.kernels import native
from dtrain.models.kernels.elementwise import mlp_forward, norm_forward, rotary
from dtrain.models.kernels.fused_cross_entropy import FusedLossHead
from dtrain.models.kernels.lora_linear import SharedInputGroup, is_supported_linear
from dtrain.models.kernels.output_probe import OutputProbe
from dtrain.models.kernels.same_program import runs_its_class, same_program

# Children that a module calls one after the other with the same input.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
KINDS = ("adapted layers", "norms", "MLPs", "rotary embeddings", "chunked loss")
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
        return "off, as the recipe says"
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
    counts = dict.fromkeys(KINDS, 0)
    for module in list(model.modules()):
        counts["adapted layers"] += _share_inputs(module)
        counts["norms"] += _replace_forward(module, llama.LlamaRMSNorm, norm_forward)
        if _is_silu(getattr(module, "act_fn", None)):
            counts["MLPs"] += _replace_forward(module, llama.LlamaMLP, mlp_forward)
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
    head = inner.get_output_embeddings() if inner is not None else None
    if inner is None or type(head) is not nn.Linear:
        return False
    probe = OutputProbe(inner, head)
    if probe.exact:
        FusedLossHead(inner, head, probe.transform)
    return probe.exact
