"""Which modules of a model hold routed experts, and which choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from dtrain.core.errors import UserError
from dtrain.core.lazy_import import LazyModule
from dtrain.models.kernels.same_program import same_program

llama4: Any = LazyModule("transformers.models.llama4.modeling_llama4")  # few models need it

MARK = "chooses_experts"  # attribute of routers, which their copies have too


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts that `routed_experts` or `batched_experts` computes."""
    return is_routed(module) or is_batched(module)


def is_routed(module: nn.Module) -> bool:
    """Whether transformers lets a function of its registry compute this module's experts."""
    return all(hasattr(module, name) for name in ("is_concatenated", "has_gate", "num_experts"))


def is_batched(module: nn.Module) -> bool:
    """Whether a module's experts are computed as Llama 4's, all of them for all tokens."""
    if is_routed(module) or not hasattr(module, "num_experts"):
        return False
    return _computes_as_llama4(type(module))  # type: ignore[arg-type]


@cache
def _computes_as_llama4(kind: type[nn.Module]) -> bool:
    own: type[nn.Module] = llama4.Llama4TextExperts  # PEFT makes subclasses of it
    return kind.forward is own.forward or same_program(kind.forward, own.forward, (kind, own))


def has_transposed_matrices(module: nn.Module) -> bool:
    """Whether the matrices of an experts module are [in, out]."""
    return bool(getattr(module, "is_transposed", is_batched(module)))


def check_experts(model: nn.Module, where: str) -> None:
    """Check that what chooses among the experts of a model, if it has any, is found.

    Raises:
        UserError: it is not, or chooses more experts than there are; or each expert is layers of
            its own.
    """
    _check_choices(model, where)
    for name in own_experts(model):
        module, counts = model.get_submodule(name), _expert_counts(model.get_submodule(name))
        if any(isinstance(x, nn.ModuleList) and len(x) in counts for x in module.modules()):
            raise UserError(
                f"the experts of {name} are layers of their own, of which those without tokens get "
                "no gradient",
                where=where,
                fix="choose a mixture of experts that transformers computes, or a dense model",
            )
    blocks = {name.rpartition(".")[0] for name in routers(model)}
    names = [name for name, module in model.named_modules() if is_experts(module)]
    lost = [name for name in names if name.rpartition(".")[0] not in blocks]
    if not blocks:
        lost += own_experts(model)
    if lost:
        raise UserError(
            f"what chooses among {lost[0]} was not found, so that it would not stay as it is",
            where=where,
            fix="choose another mixture of experts, or a dense model",
        )


def _check_choices(model: nn.Module, where: str) -> None:
    for name, experts in model.named_modules():
        if not is_experts(experts):
            continue
        block, count = name.rpartition(".")[0], int(experts.num_experts)
        for module in model.get_submodule(block).modules():  # the router, or the block itself
            chosen = vars(module).get("top_k")
            if type(chosen) is int and not 0 < chosen <= count:
                raise UserError(f"a token uses {chosen} of {count} experts in {block}", where=where)


def own_experts(model: nn.Module) -> list[str]:
    """Names of the modules with a number of experts, if none of them `is_experts`.

    Such experts are computed by code of the model's own, in which they cannot get adapters.
    """
    modules = dict(model.named_modules())
    if any(is_experts(module) for module in modules.values()):
        return []
    return [
        name
        for name, module in modules.items()
        if not isinstance(module, PreTrainedModel) and _expert_counts(module)
    ]


def _expert_counts(module: nn.Module) -> set[int]:
    """The numbers that a module keeps under names such as num_experts."""
    numbers = {v for k, v in vars(module).items() if "expert" in k and type(v) is int}
    return {number for number in numbers if number > 1}


def expert_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters [E, …] that hold the layers of experts, by name."""
    return {
        f"{name}.{parameter}": values
        for name, module in model.named_modules()
        if is_experts(module)
        for parameter, values in module.named_parameters(recurse=False)
        if values.dim() == 3
    }


def expert_biases(model: nn.Module) -> set[str]:
    """Names of the parameters that stack the biases [o] of experts."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if is_experts(module)
        for parameter, values in module.named_parameters(recurse=False)
        if len(whole_shape(values)) < 3
    }


def whole_shape(parameter: Tensor) -> Sequence[int]:
    """The shape of a parameter; where ZeRO-3 keeps a shard of it, `ds_shape` is the whole."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def routers(model: nn.Module) -> set[str]:
    """Names of the modules that choose experts, next to them, with all that is inside."""
    declared = recorded_routers(model)[1]
    found = set()
    for name, module in model.named_modules():
        if is_experts(module):
            found |= _routers_of(model, name, int(module.num_experts), set(declared))
    for name in own_experts(model):
        for count in _expert_counts(model.get_submodule(name)):
            found |= _routers_of(model, name, count, set(declared))
    return found


def is_router(module: nn.Module) -> bool:
    """Whether `fix_routers` found a module to be a router, or it is the copy of one."""
    return MARK in vars(module)


def router_layers(model: nn.Module) -> set[str]:
    """Names of the routers and of the modules inside them."""
    return {
        layer
        for name in routers(model)
        for layer, _ in model.get_submodule(name).named_modules(prefix=name)
    }


def recorded_routers(model: nn.Module) -> tuple[int, list[nn.Module]]:
    """Where routers return their logits, and the routers, as transformers records both."""
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if isinstance(recorder, OutputRecorder):
            kind = recorder.target_class
            return recorder.index, [m for m in model.modules() if isinstance(m, kind)]
    return 0, []


def _routers_of(model: nn.Module, experts: str, count: int, declared: set[nn.Module]) -> set[str]:
    """The routers of some experts: what transformers records, or what has a row for each."""
    block, _, own = experts.rpartition(".")
    siblings = {
        f"{block}.{n}": m for n, m in model.get_submodule(block).named_children() if n != own
    }
    recorded = {
        name for name, child in siblings.items() if not declared.isdisjoint(child.modules())
    }
    return recorded or {n for n, child in siblings.items() if _has_a_row_for_each(child, count)}


def _has_a_row_for_each(module: nn.Module, experts: int) -> bool:
    """Whether a module has weights with a row for each expert."""
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        siblings = module.get_submodule(name.rpartition(".")[0]).children() if name else ()
        if any(getattr(other, "in_features", 0) == experts for other in siblings):
            continue  # an MLP that is as wide as there are experts
        if getattr(layer, "out_features", len(weight)) == experts:  # a weight may be packed
            return True
    return False


def count_choices(chosen: Tensor, experts: int) -> Tensor:
    """How often each of E experts is chosen, [E], without waiting for the device."""
    # A GPU counts integers in a fixed order; a CPU has only floats.
    dtype = torch.float32 if chosen.device.type == "cpu" else torch.int32
    return torch.histc(chosen.flatten().to(dtype), bins=experts, min=0, max=experts)


def fix_routers(model: nn.Module) -> None:
    """Let routers choose as in evaluation, always.

    In training PhiMoE's draw at random, and Mixtral's block its input (`router_jitter_noise`), so
    that losses would depend on the ranks.
    """
    for name in router_layers(model):
        model.get_submodule(name).eval().train = _stay  # type: ignore[assignment,method-assign]
    for name in routers(model):
        setattr(model.get_submodule(name), MARK, True)
        block = model.get_submodule(name.rpartition(".")[0])
        for key in [key for key in vars(block) if key.endswith("jitter_noise")]:
            setattr(block, key, 0.0)


def _stay(mode: bool = True) -> None:
    """Replaces `train` of a module whose mode does not change."""
