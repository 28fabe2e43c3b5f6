"""Check the names in a stage's settings against the modules of its base, without building it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from dtrain.config.methods import AdapterSettings, Full, Lora
from dtrain.config.methods.patterns import check_parameter_patterns
from dtrain.config.schema import Recipe, Stage
from dtrain.core.check_report import CheckReport
from dtrain.core.errors import UserError
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.planning.shapes import (
    LinearShape,
    ModelShape,
    layer_names,
    matching_linears,
    select_linears,
)
from dtrain.planning.whole_modules import HEAD_NORMS, NORMS_OF_A_LAYER, select_modules

RATE_SCALES = "train.learning_rate_scales"
Shapes = Mapping[str, list[int]]


def check_methods(recipe: Recipe, shape: ModelShape, report: CheckReport) -> None:
    """Check that every name and pattern in the stages' settings means a module of the base.

    Stages after the first start from the merged model, whose modules have the same names.

    Args:
        shape: from a config.json: its parameters have the names of the known architectures.
    """
    for stage in recipe.stages:
        with report.collect(f"stages.{stage.name}", "."):
            _check_method(stage, shape, has_new_tokens=recipe.model.tokens is not None)
            if stage.method.adapter is not None:
                _note_experts(stage.name, stage.method.adapter, shape, report)


def check_names(recipe: Recipe, tensors: Shapes, report: CheckReport) -> None:
    """The same for an architecture that the plan does not know, by the names in the base's files.

    Loading may rename tensors, so a name that is not there is noted, and checked by the run.
    """
    stems = {name.rpartition(".")[0] for name in tensors}
    for stage in recipe.stages:
        for key, name in _names(stage):
            if not any(f".{stem}".endswith(f".{name}") for stem in stems):
                report.note(
                    f"stages.{stage.name}.{key}: no tensor in the base's files belongs to a module "
                    f"named {name!r}; the run checks it on the model, before the first stage trains"
                )


def _names(stage: Stage) -> Iterator[tuple[str, str]]:
    """Key and name of each module that a stage's settings name."""
    if (adapter := stage.method.adapter) is None:
        return
    if not isinstance(adapter.target_modules, str):
        yield from (("method.target_modules", name) for name in adapter.target_modules)
    yield from (("method.modules_to_save", name) for name in adapter.whole_modules)


def _check_method(stage: Stage, shape: ModelShape, *, has_new_tokens: bool) -> None:
    method, scales = stage.method, stage.train.learning_rate_scales
    if method.trains_router and not shape.routers:
        fix = "remove it, or choose the base of a mixture of experts"
        raise UserError("this model has no routers", where="method.router", fix=fix)
    if isinstance(method, Full):
        check_parameter_patterns(scales, _check_full(method, shape), RATE_SCALES)
    elif method.adapter is not None:
        linears = check_adapter(method.adapter, shape)
        if isinstance(method, Lora):  # of other adapters the run knows the names
            names = [*_lora_parameters(method, shape, linears), *_copies(method, shape)]
            names += [*_token_rows(method, shape)] if has_new_tokens else []
            check_parameter_patterns(scales, names, RATE_SCALES)


def _note_experts(
    stage: str, adapter: AdapterSettings, shape: ModelShape, report: CheckReport
) -> None:
    """Note experts that are named, or among all layers, and get no adapter of this kind."""
    named = matching_linears(shape, adapter.target_modules, experts=True)
    expected = getattr(adapter, "experts", True) and not adapter.adapts_experts
    if expected and any(linear.experts > 1 for linear in named):
        report.note(
            f"warning: stages.{stage}.method: {adapter.kind} has no adapters for experts, which "
            "stay as they are; kind=lora, rslora or qlora adapts them"
        )


def check_adapter(adapter: AdapterSettings, shape: ModelShape) -> tuple[LinearShape, ...]:
    """Check an adapter's keys against a model; return the linear layers that get one.

    Raises:
        UserError: a name or a pattern matches no module, or one that cannot train so.
    """
    linears = select_linears(shape, adapter.target_modules, experts=adapter.adapts_experts)
    layers = [name for linear in linears for name in layer_names(shape, linear)]
    adapter.check_layers(layers)
    ends = adapter.whole_modules
    select_modules(shape, ends, trains_router=adapter.trains_router)
    has_known_names = not shape.outer  # of other architectures the run asks the model
    if (
        shape.tied
        and has_known_names
        and len(_ending(("model.embed_tokens", "lm_head"), ends)) == 1
    ):
        raise UserError(
            "model.embed_tokens and lm_head are one matrix (tied embeddings)",
            where="method.modules_to_save",
            fix="name both, so that they train as one, or neither",
        )
    both = [] if isinstance(adapter.target_modules, str) else _ending(layers, ends)
    if both:
        raise UserError(
            f"{both[0]} cannot have an adapter and train whole",
            where="method.target_modules and method.modules_to_save",
            fix="name it in one of them",
        )
    return linears


def _lora_parameters(
    method: Lora, shape: ModelShape, linears: Iterable[LinearShape]
) -> Iterator[str]:
    leaves = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if method.has_magnitude else [])]
    wrapped = Counter[str]()
    for linear in linears:
        for layer in layer_names(shape, linear):
            name = layer
            if linear.experts > 1:  # PEFT wraps their module once for each parameter
                module = layer.rpartition(".")[0]
                name = module + ".base_layer" * wrapped[module]
                wrapped[module] += 1
            yield from (f"{PEFT_PREFIX}{name}.{leaf}.default.weight" for leaf in leaves)


def _copies(method: Lora, shape: ModelShape) -> Iterator[str]:
    """The names of the parameters of modules that train whole."""
    routers = _router_parameters(shape) if method.trains_router else set()
    for parameter in _parameters(shape):
        module, _, leaf = parameter.rpartition(".")
        if parameter in routers or _ending([module], method.whole_modules):
            yield f"{PEFT_PREFIX}{module}.modules_to_save.default.{leaf}"


def _token_rows(method: Lora, shape: ModelShape) -> Iterator[str]:
    """The names of the rows of new tokens, where no whole matrix trains."""
    for module in ("model.embed_tokens", *(() if shape.tied else ("lm_head",))):
        if not _ending([module], method.whole_modules):
            yield f"{PEFT_PREFIX}{module}.token_adapter.trainable_tokens_delta.default"


def _check_full(method: Full, shape: ModelShape) -> list[str]:
    """Check the keys of full fine-tuning; return the names of the parameters that train."""
    count = method.trainable_layers
    if count is not None and count > shape.layers:
        raise UserError(
            f"the model has {shape.layers} decoder layers, not {count}",
            where="method.trainable_layers",
            fix=f"at most {shape.layers}",
        )
    first = shape.layers - method.trained_layers(shape.layers)
    inside = [f"model.layers.{number}." for number in range(first, shape.layers)]
    whole = count is None
    names = [name for name in _parameters(shape) if whole or name.startswith(tuple(inside))]
    check_parameter_patterns(method.frozen_modules, names, "method.frozen_modules")
    trained = [name for name in names if not method.freezes(name)]
    if not trained:
        message, fix = "every parameter is frozen", "name fewer of them"
        raise UserError(message, where="method.frozen_modules", fix=fix)
    routers = _router_parameters(shape)
    if not method.trains_router:
        return [name for name in trained if name not in routers]
    if frozen := sorted(filter(method.freezes, routers)):
        raise UserError(
            f"{frozen[0]} belongs to a router, which would train and stay frozen",
            where="method.frozen_modules and method.router",
            fix="remove it from frozen_modules, or router=frozen",
        )
    return trained


def _parameters(shape: ModelShape) -> Iterator[str]:
    """The names of the model's parameters."""
    yield from shape.outer_elements
    for number, block in enumerate(shape.each_layer):
        norms = [*NORMS_OF_A_LAYER[: block.norms]]
        if block.norm_elements > block.norms * block.hidden:
            norms += HEAD_NORMS
        names = [name for linear in block.linears for name in linear.parameter_names]
        names += [*(f"{norm}.weight" for norm in norms), *block.router_names, *block.other_names]
        yield from (f"{shape.prefix}.{number}.{name}" for name in names)


def _router_parameters(shape: ModelShape) -> set[str]:
    return {
        f"{shape.prefix}.{number}.{name}"
        for number, block in enumerate(shape.each_layer)
        for name in block.router_names
    }


def _ending(names: Iterable[str], ends: Iterable[str]) -> list[str]:
    """The names that end with one of `ends`, as PEFT matches modules_to_save."""
    return [name for name in names if name.endswith(tuple(ends))]
