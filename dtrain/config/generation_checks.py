"""Checks of the sets of prompts in `evaluation.generation`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from dtrain.config.clash import Clash
from dtrain.config.generation import METRICS, GenerationSet
from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import Key
from dtrain.core.errors import nearest_name


def check_generation(recipe: Recipe) -> Iterator[Clash]:
    """Errors in sets of prompts that no file needs to be opened for."""
    for name, settings in recipe.evaluation.generation.items():
        at: Key = ("evaluation", "generation", name)
        yield from _metrics(settings, at)
        if settings.top_p < 1 and not settings.temperature:
            keys: list[Key] = [(*at, "top_p"), (*at, "temperature")]
            yield Clash(keys, "without a temperature nothing is sampled", "temperature=1.0")
        tasks = recipe.evaluation.tasks
        for other, names in (
            (("evaluation", "sets", name), recipe.evaluation.sets),
            (("evaluation", "tasks", "names"), tasks.names if tasks else ()),
        ):
            if name in names:
                yield Clash([at, other], "both have this name", "rename the set")
        yield from _gate(recipe, name, settings)
        for number, stage in enumerate(recipe.stages):
            if stage.method.added_tokens:
                keys = [at, ("stages", number, "method", "kind")]
                message = (
                    f"answers of a model with {stage.method.kind} are not generated in training"
                )
                yield Clash(keys, message, "remove the set, and answer with dtrain generate")


def _gate(recipe: Recipe, name: str, settings: GenerationSet) -> Iterator[Clash]:
    gate, known = recipe.evaluation.gates.get(name), settings.score_names
    at: Key = ("evaluation", "gates", name)
    if gate is None:
        return
    if not known:
        keys: list[Key] = [at, ("evaluation", "generation", name)]
        yield Clash(keys, "the set has no metrics that a gate could check", "add metrics")
    elif gate.metric is not None and gate.metric not in known:
        fix = nearest_name(gate.metric, known, f"use one of {', '.join(known)}")
        yield Clash([(*at, "metric")], f"the set has no score named {gate.metric}", fix)


def _metrics(settings: GenerationSet, at: Key) -> Iterator[Clash]:
    for kind in dict.fromkeys(settings.metrics):
        traits = METRICS[kind]
        if traits.module is not None and find_spec(traits.module) is None:
            message = f"{kind} needs the package {traits.module}, which is not installed"
            yield Clash([(*at, "metrics")], message, f"pip install 'dtrain[{traits.extra}]'")
        if traits.setting and traits.needs_setting and getattr(settings, traits.setting) is None:
            keys: list[Key] = [(*at, "metrics")]
            yield Clash(keys, f"{kind} needs the key {traits.setting}", f"add {traits.setting}")
    for name, traits in METRICS.items():
        is_set = traits.setting is not None and getattr(settings, traits.setting) is not None
        if is_set and name not in settings.metrics:
            keys = [(*at, str(traits.setting))]
            yield Clash(keys, f"only the metric {name} reads it", f"add {name} to metrics")
