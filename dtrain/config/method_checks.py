"""Checks of a stage's method that need several keys, or more than a key's type."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.config.clash import Clash
from dtrain.config.methods import AdaLora, MethodSettings
from dtrain.config.methods.base import PeftSettings
from dtrain.config.methods.patterns import compile_pattern
from dtrain.config.optimizers import OPTIMIZERS
from dtrain.config.schema import Recipe, Stage
from dtrain.config.yaml_document import Key
from dtrain.core.errors import UserError
from dtrain.core.run_dir import BASE_MODEL


def check_method(recipe: Recipe, stage: Stage, at: Key) -> Iterator[Clash]:
    """Errors in a stage's method.

    Args:
        at: the key of the stage.
    """
    yield from _patterns(stage.method, (*at, "method"))
    if recipe.model.tokens is not None and not _trains_new_tokens(stage.method):
        keys: list[Key] = [("model", "tokens"), (*at, "method", "kind")]
        message = f"{stage.method.kind} would leave the new tokens as they start"
        yield Clash(keys, message, _new_tokens_fix(stage.method))
    if stage.method.trains_router and stage.train.neftune_noise_alpha is not None:
        keys = [(*at, "method", "router"), (*at, "train", "neftune_noise_alpha")]
        message = "the experts' load is counted in passes without the noise"
        yield Clash(keys, message, "router=frozen, or remove neftune_noise_alpha")
    if isinstance(stage.method, AdaLora):
        yield from _ranks(stage.method, (*at, "method"))
        kind: Key = (*at, "method", "kind")
        if OPTIMIZERS[stage.train.optimizer].averages:
            message = "a rank that is cut would come back from the average of the weights"
            yield Clash([kind, (*at, "train", "optimizer")], message, "optimizer=adamw")
        if recipe.engine.offload:
            message = "adalora changes weights after the update, which DeepSpeed has offloaded"
            yield Clash([kind, ("engine", "offload")], message, "engine.offload=false")
    adapter, traits = stage.method.adapter, stage.method.traits
    takes_values = traits.base_when_disabled and not traits.counts_from_start
    if adapter and adapter.initial_adapter and not takes_values:
        keys = [(*at, "method", "from_adapter"), (*at, "method", "kind")]
        message = f"{stage.method.kind} takes its first values from the base, or changes it"
        yield Clash(keys, message, "merge that adapter, and start from the merged model")


def _trains_new_tokens(method: MethodSettings) -> bool:
    whole = method.adapter.whole_modules if method.adapter else []
    return method.trains_outer or method.trains_token_rows or bool(whole)


def _new_tokens_fix(method: MethodSettings) -> str:
    whole = isinstance(method.adapter, PeftSettings)
    also = "modules_to_save=[embed_tokens, lm_head], or " if whole else ""
    return f"{also}method.kind=lora; or train on this run's merged model in a recipe of its own"


def check_adapters(recipe: Recipe) -> Iterator[Clash]:
    """Errors in several adapters of one base: they end the chain, and nothing merges them."""
    numbers = [n for n, stage in enumerate(recipe.stages) if stage.adapter_name is not None]
    names = {stage.name for stage in recipe.stages if stage.adapter_name is None}
    seen: dict[str, int] = {}
    for number in numbers:
        stage, at = recipe.stages[number], ("stages", number)
        name = str(stage.adapter_name)
        if name in names or name == BASE_MODEL or name in seen:
            yield Clash(
                [(*at, "adapter_name")], f"{name} names something else too", "choose another"
            )
        seen[name] = number
        if not stage.method.traits.adds_adapter:
            keys: list[Key] = [(*at, "adapter_name"), (*at, "method", "kind")]
            yield Clash(keys, f"{stage.method.kind} trains no adapter", "method.kind=lora or qlora")
    after = [
        n for n in range(len(recipe.stages)) if numbers and n > numbers[0] and n not in numbers
    ]
    if after:
        keys = [("stages", numbers[0], "adapter_name"), ("stages", after[0], "name")]
        message = "a stage starts from one model, and several adapters of one base make none"
        yield Clash(keys, message, "put the adapters at the end")
    if numbers and recipe.output.merge:
        keys = [("stages", numbers[0], "adapter_name"), ("output", "merge")]
        message = "several adapters of one base are not merged into one model"
        fix = "output.merge=false; `dtrain merge` merges those that you choose"
        yield Clash(keys, message, fix)


def _ranks(method: AdaLora, at: Key) -> Iterator[Clash]:
    if method.final_rank > method.r:
        message = (
            f"the rank at the end, {method.final_rank}, is higher than at the start, {method.r}"
        )
        yield Clash([(*at, "target_r"), (*at, "r")], message, "target_r at most r")
    if method.initial_ratio + method.final_ratio >= 1:
        keys: list[Key] = [(*at, "initial_ratio"), (*at, "final_ratio")]
        yield Clash(keys, "no step is left in which ranks are cut", "a sum below 1")


def _patterns(method: MethodSettings, at: Key) -> Iterator[Clash]:
    for key in ("rank_pattern", "alpha_pattern", "frozen_modules"):
        for pattern in getattr(method, key, ()):
            try:
                compile_pattern(pattern)
            except UserError as error:
                yield Clash([(*at, key, pattern)], error.message, error.fix)
