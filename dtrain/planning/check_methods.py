"""Check the names in a stage's settings against the modules of its base, without building it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dtrain.config.methods import AdapterSettings, Full, Lora
from dtrain.config.methods.patterns import check_parameter_patterns
from dtrain.config.schema import Recipe, Stage
from dtrain.core.check_report import CheckReport
from dtrain.core.errors import UserError
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.planning.shapes import LinearShape, ModelShape, layer_names, select_linears
from dtrain.planning.whole_modules import HEAD_NORMS, NORMS_OF_A_LAYER, select_modules

RATE_SCALES = "train.learning_rate_scales"
Shapes = Mapping[str, list[int]]


def check_methods(recipe: Recipe, shape: ModelShape, report: CheckReport) -> None:
    """Check that every name and pattern in the stages' settings means a module of the base.

    Stages after the first start from the merged model, whose modules have the same names.
    """
    for stage in recipe.stages:
        with report.collect(f"stages.{stage.name}", "."):
            _check_method(stage, shape, has_new_tokens=recipe.model.tokens is not None)


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
    if method.trains_router and not shape.router[0]:
        fix = "remove it, or choose the base of a mixture of experts"
        raise UserError("this model has no routers", where="method.router", fix=fix)
    if isinstance(method, Full):
        check_parameter_patterns(scales, _check_full(method, shape), RATE_SCALES)
    elif method.adapter is not None:
        layers = _check_adapter(method.adapter, shape)
        if isinstance(method, Lora):  # of other adapters the run knows the names
            names = [*_lora_parameters(method, layers), *_copies(method, shape)]
            names += [*_token_rows(method, shape)] if has_new_tokens else []
            check_parameter_patterns(scales, names, RATE_SCALES)


def _check_adapter(adapter: AdapterSettings, shape: ModelShape) -> list[str]:
    """Check an adapter's keys; return the names of the layers that get one."""
    linears = select_linears(shape, adapter.target_modules)
    layers = [name for linear in linears for name in layer_names(shape, linear)]
    adapter.check_layers(layers)
    ends = adapter.whole_modules
    select_modules(shape, ends)
    if shape.tied and len(_ending(("model.embed_tokens", "lm_head"), ends)) == 1:
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
    return layers


def _lora_parameters(method: Lora, layers: Iterable[str]) -> Iterator[str]:
    leaves = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if method.has_magnitude else [])]
    for layer in layers:
        yield from (f"{PEFT_PREFIX}{layer}.{leaf}.default.weight" for leaf in leaves)


def _copies(method: Lora, shape: ModelShape) -> Iterator[str]:
    """The names of the parameters of modules that train whole."""
    for parameter in _parameters(shape):
        module, _, leaf = parameter.rpartition(".")
        if _ending([module], method.whole_modules):
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
    return trained


def _parameters(shape: ModelShape) -> Iterator[str]:
    """The names of the model's parameters, in its own order."""
    outer = iter(shape.outer_elements)
    yield next(outer)
    norms = [*NORMS_OF_A_LAYER[: shape.norms]]
    if shape.norm_elements > shape.norms * shape.hidden:
        norms += HEAD_NORMS
    for number in range(shape.layers):
        for linear in shape.linears:
            yield from (f"model.layers.{number}.{linear.name}.{leaf}" for leaf in _leaves(linear))
        yield from (f"model.layers.{number}.{norm}.weight" for norm in norms)
    yield from outer


def _leaves(linear: LinearShape) -> tuple[str, ...]:
    return ("weight", "bias") if linear.bias else ("weight",)


def _ending(names: Iterable[str], ends: Iterable[str]) -> list[str]:
    """The names that end with one of `ends`, as PEFT matches modules_to_save."""
    return [name for name in names if name.endswith(tuple(ends))]
