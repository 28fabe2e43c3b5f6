"""Which modules of a model hold routed experts, and which choose among them."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.core.errors import UserError
from dtrain.core.lazy_import import LazyModule
from dtrain.models.kernels.same_program import same_program

llama4: Any = LazyModule("transformers.models.llama4.modeling_llama4")  # few models need it


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
    """Check that the experts of a model, if it has any, are those that can get adapters.

    Raises:
        UserError: a layer has a number of experts, but keeps them in a form of its own.
    """
    modules = dict(model.named_modules())
    counts = [
        name
        for name, module in modules.items()
        if not isinstance(module, PreTrainedModel)
        and any("expert" in key and type(value) is int for key, value in vars(module).items())
    ]
    if counts and not any(is_experts(module) for module in modules.values()):
        raise UserError(
            f"the experts of this model ({counts[0]}) are computed by code of its own, which "
            "dtrain does not train",
            where=where,
            fix="choose a mixture of experts such as qwen3_moe, mixtral, gpt_oss, or a dense model",
        )


def expert_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters [E, …] that hold the layers of experts, by name."""
    return {
        f"{name}.{parameter}": values
        for name, module in model.named_modules()
        if is_experts(module)
        for parameter, values in module.named_parameters(recurse=False)
        if values.dim() == 3
    }


def router_layers(model: nn.Module) -> set[str]:
    """Names of the modules that choose experts: next to them, with a row of weights for each."""
    routers = set()
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        block, experts = name.rpartition(".")[0], int(module.num_experts)
        for inner, layer in model.get_submodule(block).named_modules(prefix=block):
            weight = layer._parameters.get("weight")
            if weight is None or weight.dim() != 2 or f"{inner}.".startswith(f"{name}."):
                continue
            siblings = model.get_submodule(inner.rpartition(".")[0]).children()
            if any(getattr(other, "in_features", 0) == experts for other in siblings):
                continue  # an MLP that is as wide as there are experts
            if getattr(layer, "out_features", len(weight)) == experts:  # a weight may be packed
                routers.add(inner)
    return routers


def fix_routers(model: nn.Module) -> None:
    """Let routers choose as in evaluation, always.

    In training PhiMoE's draw at random, so that losses would depend on the ranks.
    """
    for name in router_layers(model):
        model.get_submodule(name).eval().train = _stay  # type: ignore[assignment,method-assign]


def _stay(mode: bool = True) -> None:
    """Replaces `train` of a module whose mode does not change."""
