"""Which layers get an adapter: the recipe's `target_modules` on a model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dtrain.config.methods.patterns import match_names
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.methods.base import summarize_names
from dtrain.models.expert_layers import expert_parameters
from dtrain.models.meta_model import linear_layers
from dtrain.models.weight_reads import layers_read_outside_forward


def resolve_targets(
    model: PreTrainedModel,
    target_modules: str | list[str],
    unused: set[str],
    saved: set[str],
    barred: set[str],
    routers: set[str],
    experts: list[str],
) -> str | list[str]:
    """The modules for PEFT to adapt; it ignores a target without a match if another one has one.

    Other code that reads a layer's weight would pass over its adapter, so it gets none.

    Args:
        unused: layers that no text reaches, or whose weight is read without calling them; an
            adapter there would never get a gradient.
        saved: modules that train whole.
        barred: layers that PEFT does not adapt; an error where they are named.
        routers: modules that choose experts, which get no adapter; the same.
        experts: parameters of experts that can get an adapter, which names may match too.

    Raises:
        UserError: a target that names no linear layer, only unused ones, or one that trains whole.
    """
    layers, read = linear_layers(model), layers_read_outside_forward(model) - unused
    if isinstance(target_modules, str):
        output = model.get_output_embeddings()
        named = {name for name, layer in layers.items() if layer is not output}
        matched = named - saved - barred - read - routers
        _say_left_out(read & named, barred)
    else:
        names = (name for name, _ in model.named_modules())  # as PEFT: of any kind
        named = matched = set(match_names(names, target_modules))
        _check_adaptable(matched, saved, read, routers)
        _check_targets(model, target_modules, layers, experts)
    used = (matched & layers.keys()) - unused
    if isinstance(target_modules, list):
        experts = match_names(experts, target_modules)
    if not used and not experts:
        raise UserError("no text reaches any of these layers", where="method.target_modules")
    if used and used == named:
        return target_modules if isinstance(target_modules, str) else list(target_modules)
    if without := matched - used:
        summary = summarize_names(without)
        say(f"{len(without)} layers get no adapter, as none would act there: {summary}")
    return sorted(used)


def _say_left_out(read: set[str], barred: set[str]) -> None:
    if read:
        summary = summarize_names(read)
        say(f"no adapters where other code of the model reads the weight: {summary}")
    if barred:
        summary = summarize_names(barred)
        say(f"{len(barred)} layers get no adapter, as PEFT has none for them: {summary}")


def _check_adaptable(matched: set[str], saved: set[str], read: set[str], routers: set[str]) -> None:
    """Check layers that a recipe names; arguments and errors as for `resolve_targets`."""
    if chosen := sorted(matched & routers):
        raise UserError(
            f"{chosen[0]} is a router, which gets no adapter",
            where="method.target_modules",
            fix="leave it out; method.router=train trains it whole",
        )
    if chosen := sorted(matched & read):
        raise UserError(
            f"{chosen[0]} gets no adapter: other code of the model reads its weight",
            where="method.target_modules",
            fix="leave it out; where other layers end in that name, name those whole",
        )
    if both := sorted(matched & saved):
        message = f"{both[0]} cannot have an adapter and train whole"
        where = "method.target_modules and method.modules_to_save"
        raise UserError(message, where=where, fix="name it in one of them")


def _check_targets(
    model: PreTrainedModel,
    target_modules: list[str],
    layers: dict[str, nn.Module],
    experts: list[str],
) -> None:
    for target in target_modules:
        if match_names([*layers, *experts], [target]):
            continue
        if match_names(expert_parameters(model), [target]):
            raise UserError(
                f"{target!r} names weights of experts, which get no adapter here",
                where="method.target_modules",
                fix="leave it out; or method.kind=lora, rslora or qlora, with experts=true",
            )
        ends = sorted({name.rpartition(".")[2] for name in [*layers, *experts]})
        raise UserError(
            f"no linear layer is named {target!r}",
            where="method.target_modules",
            fix=f"choose from: {', '.join(ends)}",
        )
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    if tied and any(layers[name] is output for name in match_names(layers, target_modules)):
        raise UserError(
            "the output matrix is tied to the embeddings and cannot have an adapter of its own",
            where="method.target_modules",
        )
