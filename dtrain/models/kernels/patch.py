"""Putting the kernels into a model, only where its own code computes what they compute.

transformers copies Llama's code into many models. A module whose forward is Llama's, instruction
for instruction, gets a kernel; any other keeps its own. The chunked loss goes to every model whose
forward returns what its output layer gives, or that adjusted row by row.
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
from dtrain.models.kernels.fused_cross_entropy import FusedLossHead
from dtrain.models.kernels.lora_linear import SharedInput, is_fast
from dtrain.models.kernels.output_probe import OutputProbe
from dtrain.models.kernels.rms_norm import norm_forward
from dtrain.models.kernels.rotary import rotary
from dtrain.models.kernels.same_program import runs_its_class, same_program
from dtrain.models.kernels.swiglu import mlp_forward

# Children that a module calls one after the other with the same tensor.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
KINDS = ("adapted layers", "norms", "MLPs", "rotary embeddings", "chunked loss")
_same = cache(same_program)  # a model repeats its modules
ROTARY = ("apply_rotary_pos_emb", "rotate_half")


def apply_kernels(model: nn.Module, settings: schema.Model) -> str:
    """Put kernels into a model as its recipe says.

    Args:
        model: of transformers, with its adapters, before an engine takes it.

    Returns:
        What was done, for a person.
    """
    if settings.kernels == "off":
        return "plain, as the recipe says"
    why = native.switch(on=True)
    found = use_kernels(model)
    if not found:
        return "plain: nothing in this model computes as Llama does"
    without = [kind for kind in KINDS if kind not in found]
    text = ", ".join(f"{count} {kind}" for kind, count in found.items())
    text += f"; plain: {', '.join(without)}" if without else ""
    return text + (f"; loops by torch: {why}" if why else "")


def use_kernels(model: nn.Module) -> dict[str, int]:
    """Put in all kernels that fit; return for how many modules of each kind."""
    found = dict.fromkeys(KINDS, 0)
    for module in list(model.modules()):
        found["adapted layers"] += _share_inputs(module)
        found["norms"] += _stands_for(module, llama.LlamaRMSNorm, norm_forward)
        if _is_silu(getattr(module, "act_fn", None)):
            found["MLPs"] += _stands_for(module, llama.LlamaMLP, mlp_forward)
        found["rotary embeddings"] += _rotate(module)
    found["chunked loss"] += _chunk_loss(model)
    return {kind: count for kind, count in found.items() if count}


def _share_inputs(module: nn.Module) -> int:
    """Compute the module's adapted children by `shared_input`; return how many they are."""
    fast = {name: child for name, child in module.named_children() if is_fast(child)}
    groups: list[tuple[str, ...]] = [
        names for names in TOGETHER if all(name in fast for name in names)
    ]
    grouped = {name for names in groups for name in names}
    groups += [(name,) for name in fast if name not in grouped]
    count = 0
    for names in groups:
        members = [fast[name] for name in names]
        if any(isinstance(member, LoraLayer) for member in members):
            SharedInput(members)
            count += len(members)
    return count


def _stands_for(module: nn.Module, known: type[nn.Module], forward: Callable[..., Any]) -> bool:
    """Put `forward` in if the module's own is that of the class `known`."""
    own = type(module)
    fits = runs_its_class(module) and _same(own.forward, known.forward, (own, known))
    if fits:
        module.forward = partial(forward, module)
    return fits


def _is_silu(activation: Any) -> bool:
    return type(activation) in (nn.SiLU, SiLUActivation) and runs_its_class(activation)


def _rotate(module: nn.Module) -> bool:
    """Let an attention's own forward find our rotary where it looks for transformers'."""
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


def _chunk_loss(model: nn.Module) -> bool:
    """Let the output layer give the loss, if the model's logits follow from what it gives."""
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    head = inner.get_output_embeddings() if inner is not None else None
    if inner is None or type(head) is not nn.Linear:
        return False
    probe = OutputProbe(inner, head)
    if probe.exact:
        FusedLossHead(inner, head, probe.adjust)
    return probe.exact
