"""Checks of a stage's group `train`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from math import lcm

from dtrain.config.clash import Clash
from dtrain.config.methods.patterns import compile_pattern
from dtrain.config.objectives import OBJECTIVES
from dtrain.config.optimizers import OPTIMIZERS
from dtrain.config.schema import Recipe, Stage
from dtrain.config.train import LR_SCHEDULER_KEYS, Train
from dtrain.config.yaml_document import Key
from dtrain.core.errors import UserError


def check_train(recipe: Recipe, stage: Stage, at: Key) -> Iterator[Clash]:
    """Errors in the settings of a stage's training, whose key in the recipe is `at`."""
    yield from _length(stage, at)
    yield from _watching(recipe, stage, at)
    yield from _learning_rate(stage.train, at)
    optimizer = stage.train.optimizer
    if not (OPTIMIZERS[optimizer].trains_adapters or stage.method.traits.trains_base):
        keys: list[Key] = [(*at, "optimizer"), (*at[:-1], "method", "kind")]
        message = f"{optimizer} updates whole weight matrices, and {stage.method.kind} trains none"
        yield Clash(keys, message, "optimizer=adamw, or method.kind=full")
    yield from _optimizer(stage.train, at)
    if stage.train.label_smoothing and not OBJECTIVES[stage.kind].sums_token_losses:
        keys = [(*at[:-1], "kind"), (*at, "label_smoothing")]
        message = f"{stage.kind} has no cross-entropy of single tokens to smooth"
        yield Clash(keys, message, "label_smoothing=0.0; for dpo preference.label_smoothing")


def _optimizer(train: Train, at: Key) -> Iterator[Clash]:
    kind, traits = train.optimizer, OPTIMIZERS[train.optimizer]
    if traits.averages and train.lr_scheduler != "constant":
        keys: list[Key] = [(*at, "optimizer"), (*at, "lr_scheduler")]
        message = f"{kind} averages the weights instead of lowering the learning rate"
        yield Clash(keys, message, "lr_scheduler=constant, which may have a warm-up")
    if traits.module and find_spec(traits.module) is None:
        message = f"{kind} needs the package {traits.module}, which is not installed"
        fix = f"pip install 'dtrain[{kind.replace('_', '-')}]'"
        yield Clash([(*at, "optimizer")], message, fix)


def _length(stage: Stage, at: Key) -> Iterator[Clash]:
    names = ("epochs", "steps", "tokens")
    present = [name for name in names if getattr(stage.train, name) is not None]
    if not present:
        keys: list[Key] = [(*at, name) for name in names]
        yield Clash(keys, "the length of the training is missing", "set one of them")
    elif len(present) > 1:
        yield Clash([(*at, name) for name in present], "only one of them can be set")


def _watching(recipe: Recipe, stage: Stage, at: Key) -> Iterator[Clash]:
    train, sets = stage.train, recipe.evaluation.sets
    every: Key = (*at, "evaluate_every_steps")
    if train.evaluate_every_steps is None:
        for name in ("early_stopping_patience", "evaluate_on", "maximize"):
            if getattr(train, name) is not None:
                message = "nothing is evaluated during training"
                yield Clash([(*at, name), every], message, "set evaluate_every_steps")
    elif not sets:
        fix = "add a set to evaluation.sets, or remove evaluate_every_steps"
        yield Clash([every, ("evaluation", "sets")], "there is no evaluation set", fix)
    if train.evaluate_on is not None and sets and train.evaluate_on not in sets:
        message = f"there is no set named {train.evaluate_on}"
        fix = f"use one of {', '.join(sets)}"
        yield Clash([(*at, "evaluate_on"), ("evaluation", "sets")], message, fix)
    watched = sets.get(train.evaluate_on or next(iter(sets), ""))
    has_tokens = watched is not None and OBJECTIVES[watched.kind].sums_token_losses
    if train.maximize and train.evaluate_every_steps and watched and has_tokens:
        message = f"a set of kind {watched.kind} reports no metric whose highest value is best"
        fix = "remove it: the lowest loss is best; or evaluate_on=a set of pairs"
        yield Clash([(*at, "maximize"), (*at, "evaluate_on")], message, fix)
    if recipe.output.use == "best":
        yield from _best(train, at)


def _best(train: Train, at: Key) -> Iterator[Clash]:
    """Errors if no step before the last is both measured and saved."""
    use: Key = ("output", "use")
    names = ("evaluate_every_steps", "checkpoint_every_steps")
    missing = [name for name in names if getattr(train, name) is None]
    for name in missing:
        action = "measures" if name == names[0] else "saves"
        message = f"there is no best model to choose: nothing {action} this stage on the way"
        yield Clash([use, (*at, name)], message, f"set {name}, or use=last")
    if missing or train.steps is None:
        return
    assert train.evaluate_every_steps is not None and train.checkpoint_every_steps is not None
    both = lcm(train.evaluate_every_steps, train.checkpoint_every_steps)
    if both >= train.steps:
        keys: list[Key] = [use, *((*at, name) for name in (*names, "steps"))]
        message = f"no step before the last is measured and saved: the first would be {both}"
        yield Clash(keys, message, f"checkpoint_every_steps={train.evaluate_every_steps}")


def _learning_rate(train: Train, at: Key) -> Iterator[Clash]:
    for pattern in train.learning_rate_scales:
        try:
            compile_pattern(pattern)
        except UserError as error:
            key: Key = (*at, "learning_rate_scales", pattern)
            yield Clash([key], error.message, error.fix)
    schedule: Key = (*at, "lr_scheduler")
    known = LR_SCHEDULER_KEYS[train.lr_scheduler]
    for name in sorted(frozenset().union(*LR_SCHEDULER_KEYS.values()) - known):
        if getattr(train, name) != Train.model_fields[name].default:
            able = [kind for kind, keys in LR_SCHEDULER_KEYS.items() if name in keys]
            message = f"{train.lr_scheduler} has no {name}"
            yield Clash([schedule, (*at, name)], message, f"lr_scheduler={' or '.join(able)}")
    if "decay_ratio" in known and train.warmup_ratio + train.decay_ratio > 1:
        keys: list[Key] = [(*at, "warmup_ratio"), (*at, "decay_ratio")]
        yield Clash(keys, "together they are more than all steps", "lower one of them")
