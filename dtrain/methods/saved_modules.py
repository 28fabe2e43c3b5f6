"""Whole modules that train together with an adapter: PEFT's modules_to_save.

PEFT keeps the frozen original and trains a copy. Here a copy is float32, takes its first values
from the loaded base, and is one parameter where the originals are one (tied embeddings).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import MethodSettings
from dtrain.core.errors import UserError, nearest_name
from dtrain.models.expert_layers import is_experts, router_layers, routers

WHERE, ROUTER = "method.modules_to_save", "method.router"


def check_modules_to_save(
    model: PreTrainedModel, names: Iterable[str], unused: set[str]
) -> set[str]:
    """Check what PEFT would copy.

    Args:
        model: before PEFT changes it.
        names: PEFT matches the ends of modules' names, `norm` that of `input_layernorm` too.
        unused: parameters that no text reaches, from `unused_parameters`.

    Returns:
        The names of the modules.

    Raises:
        UserError: a name matches nothing, or a module cannot train whole.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    saved: dict[str, nn.Module] = {}
    for name in names:
        matching = {n: m for n, m in modules.items() if n.endswith(name)}
        if not matching:
            raise _unknown(name, modules)
        saved |= matching
    for name, module in saved.items():
        if not _is_layer(module):
            fix = "name modules with weights of their own: embed_tokens, lm_head, norm, ..."
            raise UserError(f"{name} is no single layer with weights", where=WHERE, fix=fix)
        if isinstance(module, Linear4bit):
            raise UserError(f"{name} is in NF4", where=WHERE, fix="method.kind: lora")
        if _is_unused(name, module, unused):
            raise UserError(f"no text reaches {name}", where=WHERE, fix="remove it")
        _check_dtype(name, module)
    _check_tied(model, saved)
    return set(saved)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has weights of its own, and neither modules nor experts in it."""
    is_leaf = not any(True for _ in module.children()) and not is_experts(module)
    return is_leaf and any(True for _ in module.parameters())


def _is_unused(name: str, module: nn.Module, unused: set[str]) -> bool:
    return all(f"{name}.{leaf}" in unused for leaf, _ in module.named_parameters())


def trained_routers(model: nn.Module, method: MethodSettings, unused: set[str]) -> set[str]:
    """The names of the routers that train: of all that a text reaches.

    Args:
        unused: as for `check_modules_to_save`.

    Raises:
        UserError: the model has none, or a router trains without its loss.
    """
    if method.trains_router:
        found = {
            name
            for name in routers(model)
            if not _is_unused(name, model.get_submodule(name), unused)
        }
        if not found:
            fix = "remove it, or choose the base of a mixture of experts"
            raise UserError("this model has no routers", where=ROUTER, fix=fix)
        return found
    ends = method.adapter.whole_modules if method.adapter else []
    if named := [name for name in sorted(router_layers(model)) if name.endswith(tuple(ends))]:
        message = f"{named[0]} is a router, which trains with its load-balancing loss"
        raise UserError(message, where=WHERE, fix="name it no longer: method.router=train")
    return set()


def _unknown(name: str, modules: dict[str, nn.Module]) -> UserError:
    layers = {n for n, m in modules.items() if _is_layer(m)}
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    fix = nearest_name(name, ends, f"choose from: {', '.join(ends)}")
    return UserError(f"no module is named {name!r}", where=WHERE, fix=fix)


def _check_dtype(name: str, module: nn.Module) -> None:
    """Check that a float32 copy computes as the original: some embeddings scale in their dtype."""
    is_plain = type(module).forward in (nn.Embedding.forward, nn.Linear.forward)
    is_embedding = isinstance(module, nn.Embedding)
    if is_embedding and not is_plain and next(module.parameters()).dtype != torch.float32:
        raise UserError(
            f"{name} ({type(module).__name__}) computes differently in float32, in which it would "
            "train",
            where=WHERE,
            fix="model.dtype=float32, or leave it out",
        )


def _check_tied(model: PreTrainedModel, saved: dict[str, nn.Module]) -> None:
    """Check that of a matrix with two uses both are trained, as one."""
    uses: dict[nn.Parameter, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                uses.setdefault(parameter, set()).add(name)
    for names in uses.values():
        if (inside := names & saved.keys()) and (outside := names - saved.keys()):
            missing = ", ".join(sorted(name.rpartition(".")[2] for name in outside))
            raise UserError(
                f"{' and '.join(sorted(inside | outside))} are one matrix (tied embeddings)",
                where=WHERE,
                fix=f"add {missing}, so that it trains as one, or remove the other",
            )


def saved_wrappers(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """The modules that train whole, with their names in a model that PEFT adapted."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, module


def saved_parameters(model: nn.Module) -> dict[str, str]:
    """The parameters of the copies: name in the model → name in the base."""
    return {
        f"{name}.modules_to_save.{adapter}.{leaf}": f"{name}.{leaf}"
        for name, wrapper in saved_wrappers(model)
        for adapter, copy in wrapper.modules_to_save.items()
        for leaf, parameter in copy.named_parameters()
        if parameter.requires_grad
    }


def prepare_copies(model: nn.Module, unused: set[str]) -> None:
    """Make the copies float32, one where the originals are one; those on the meta device stay.

    Args:
        model: without PEFT's wrapper.
        unused: parameters that no text reaches. They are buffers of the copy, which no engine
            shards, as PEFT has them in the adapter's file.
    """
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for name, wrapper in saved_wrappers(model):
        for copy in wrapper.modules_to_save.values():
            for leaf, original in wrapper.original_module.named_parameters():
                if f"{name}.{leaf}" in unused:
                    _make_buffer(copy, leaf, original)
                    continue
                if original not in shared:
                    values = original.detach().to(torch.float32, copy=True)
                    shared[original] = nn.Parameter(values)
                _set_parameter(copy, leaf, shared[original])
            if not isinstance(copy, nn.Linear):  # autocast casts a linear layer's inputs
                copy.register_forward_hook(_as_original(wrapper.original_module))


def fill_copies(block: nn.Module) -> None:
    """Copy the base's values into the copies of a block that have none yet."""
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for _, wrapper in saved_wrappers(block):
        for copy in wrapper.modules_to_save.values():
            for leaf, empty in list(copy.named_parameters()):
                if not empty.is_meta:
                    continue
                if empty not in filled:
                    original = wrapper.original_module.get_parameter(leaf)
                    values = original.detach().to(torch.float32, copy=True)
                    filled[empty] = nn.Parameter(values, requires_grad=empty.requires_grad)
                _set_parameter(copy, leaf, filled[empty])
            for leaf, buffer in wrapper.original_module.named_buffers():
                _holder(copy, leaf)._buffers[leaf.rpartition(".")[2]] = buffer
            for leaf, original in wrapper.original_module.named_parameters():
                if leaf not in dict(copy.named_parameters(remove_duplicate=False)):
                    _make_buffer(copy, leaf, original)


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What the copies hold that does not train, by name in the model: PEFT loads it too."""
    return {
        f"{name}.modules_to_save.{adapter}.{leaf}": values
        for name, wrapper in saved_wrappers(model)
        for adapter, copy in wrapper.modules_to_save.items()
        for leaf, values in copy.named_buffers()
        if leaf.rpartition(".")[2] not in _holder(copy, leaf)._non_persistent_buffers_set
    }


def _holder(module: nn.Module, name: str) -> nn.Module:
    """The module inside that has a tensor of its own."""
    return module.get_submodule(name.rpartition(".")[0])


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    _holder(module, name)._parameters[name.rpartition(".")[2]] = parameter


def _make_buffer(copy: nn.Module, name: str, original: Tensor) -> None:
    """Let a copy have a frozen parameter of its original as a buffer."""
    holder, leaf = _holder(copy, name), name.rpartition(".")[2]
    holder._parameters.pop(leaf, None)
    holder.register_buffer(leaf, original.detach().clone())


def _as_original(original: nn.Module) -> Any:
    """A hook that casts a copy's output to the dtype that the original would return."""
    dtype = next(original.parameters()).dtype

    def cast(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        x = inputs[0]
        if not isinstance(output, Tensor):  # a router's: it casts to the dtype of its input
            return output
        return output.to(torch.promote_types(x.dtype, dtype) if x.is_floating_point() else dtype)

    return cast
