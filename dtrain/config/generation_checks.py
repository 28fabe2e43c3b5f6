"""Checks of the sets of prompts in `evaluation.generation`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from dtrain.config.clash import Clash
from dtrain.config.generation import METRICS, GenerationSet
from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import Key


def check_generation(recipe: Recipe) -> Iterator[Clash]:
    """Errors in sets of prompts that no file needs to be opened for."""
    for name, settings in recipe.evaluation.generation.items():
        at: Key = ("evaluation", "generation", name)
        yield from _metrics(settings, at)
        if settings.top_p < 1 and not settings.temperature:
            keys: list[Key] = [(*at, "top_p"), (*at, "temperature")]
            yield Clash(keys, "without a temperature nothing is sampled", "temperature=1.0")
        if name in recipe.evaluation.sets:
            keys = [at, ("evaluation", "sets", name)]
            yield Clash(keys, "two sets have the same name", "rename one of them")
        for number, stage in enumerate(recipe.stages):
            if stage.method.added_tokens:
                keys = [at, ("stages", number, "method", "kind")]
                message = (
                    f"answers of a model with {stage.method.kind} are not generated in training"
                )
                yield Clash(keys, message, "remove the set, and answer with dtrain generate")


def _metrics(settings: GenerationSet, at: Key) -> Iterator[Clash]:
    for kind in dict.fromkeys(settings.metrics):
        traits = METRICS[kind]
        if traits.module is not None and find_spec(traits.module) is None:
            message = f"{kind} needs the package {traits.module}, which is not installed"
            yield Clash([(*at, "metrics")], message, f"pip install 'dtrain[{traits.extra}]'")
        if traits.setting and traits.needs_setting and getattr(settings, traits.setting) is None:
            keys: list[Key] = [(*at, "metrics")]
            yield Clash(keys, f"{kind} needs the key {traits.setting}", f"add {traits.setting}")
    for kind, traits in METRICS.items():
        is_set = traits.setting is not None and getattr(settings, traits.setting) is not None
        if is_set and kind not in settings.metrics:
            keys = [(*at, str(traits.setting))]
            yield Clash(keys, f"only the metric {kind} reads it", f"add {kind} to metrics")
