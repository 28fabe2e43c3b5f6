"""Checks of a recipe that need several keys; each error names the keys and a fix."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.config import deepspeed_file
from dtrain.config.clash import Clash
from dtrain.config.data import Data
from dtrain.config.distill_checks import check_distill
from dtrain.config.engines import ENGINES, engines_with
from dtrain.config.generation_checks import check_generation
from dtrain.config.method_checks import check_adapters, check_method
from dtrain.config.objectives import OBJECTIVES, format_mismatch
from dtrain.config.optimizers import OPTIMIZERS
from dtrain.config.preference import PreferenceSettings
from dtrain.config.regularize_checks import check_regularize
from dtrain.config.run_folder_checks import check_run_folder
from dtrain.config.schema import Recipe, Stage
from dtrain.config.tasks import Tasks, check_tasks
from dtrain.config.trackers import check_trackers
from dtrain.config.train_checks import check_train
from dtrain.config.yaml_document import Key
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError, UserErrors
from dtrain.core.run_dir import BASE_MODEL
from dtrain.core.run_dir import RESERVED_NAMES as RUN_FILES

RESERVED_NAMES = RUN_FILES | {BASE_MODEL}  # of stages


CHOSEN_BY_AUTO = ("strict", "whole_parameters")
"""Capabilities that `engine.kind: auto` respects; others are settings of a named engine."""


def check(recipe: Recipe) -> list[Clash]:
    """All errors that a single key does not show.

    It opens no file except `engine.config` and those of tasks.
    """
    return [
        *unsupported_by_engine(recipe),
        *_deepspeed_file(recipe),
        *_device(recipe),
        *_stage_names(recipe),
        *check_run_folder(recipe),
        *(clash for number in range(len(recipe.stages)) for clash in _stage(recipe, number)),
        *check_adapters(recipe),
        *_evaluation(recipe),
        *check_generation(recipe),
        *check_trackers(recipe.monitoring.report_to),
    ]


def accumulation(global_batch: int, ranks: int, micro_batch: int) -> int:
    """Gradient accumulation: micro-batches per rank in an optimizer step.

    Args:
        global_batch: sequences in a step, over all ranks.
        ranks: processes that share them.
        micro_batch: sequences per rank and forward pass.

    Raises:
        UserError: `global_batch` is not a multiple of `ranks` x `micro_batch`; the closest values
            that work are proposed.
    """
    together = ranks * micro_batch
    if global_batch % together == 0:
        return global_batch // together
    message = (
        f"{global_batch} sequences cannot be divided by {ranks} ranks x {micro_batch} sequences"
    )
    raise UserError(
        message, where="train.global_batch_size", fix=_divisors(global_batch, ranks, together)
    )


def check_batches(recipe: Recipe, ranks: int) -> None:
    """Check that every stage's batch can be divided among the ranks.

    Raises:
        UserError: it cannot; see `accumulation`.
    """
    for stage in recipe.stages:
        accumulation(stage.train.global_batch_size, ranks, stage.train.micro_batch)


def _divisors(global_batch: int, ranks: int, together: int) -> str:
    below, above = global_batch // together * together, -(-global_batch // together) * together
    batches = " or ".join(str(n) for n in (below, above) if n)
    proposals = [f"global_batch_size {batches}"]
    if global_batch % ranks == 0:
        share, old = global_batch // ranks, together // ranks
        micro = max(n for n in range(1, min(share, old) + 1) if share % n == 0)
        proposals.append(f"micro_batch_size {micro}")
    else:
        fewer = max(n for n in range(1, min(ranks, global_batch) + 1) if global_batch % n == 0)
        proposals.append(f"{fewer} ranks with micro_batch_size 1")
    return "use " + ", or ".join(proposals)


def unsupported_by_engine(recipe: Recipe) -> Iterator[Clash]:
    """Settings that the recipe's engine does not support, according to the table of engines."""
    engine = recipe.engine
    uses: list[tuple[Key, str, str, str]] = []
    if recipe.determinism == "strict":
        uses.append((("determinism",), "strict", "determinism: strict", "determinism=off"))
    for number, stage in enumerate(recipe.stages):
        optimizer = stage.train.optimizer
        if OPTIMIZERS[optimizer].whole_parameters:
            at: Key = ("stages", number, "train", "optimizer")
            feature = f"{optimizer}, which needs whole parameters on each rank"
            uses.append((at, "whole_parameters", feature, "optimizer=adamw or lion"))
    if engine.offload:
        uses.append((("engine", "offload"), "offload", "offload", "offload=false"))
    if engine.shard != "all":
        uses.append((("engine", "shard"), "shard_group", "shard groups", "shard=all"))
    if engine.config is not None:
        fix = "remove engine.config"
        uses.append((("engine", "config"), "zero_stage", "a DeepSpeed file", fix))
    for key, capability, feature, alternative in uses:
        able = engines_with(capability)
        if engine.kind in able or (engine.kind == "auto" and capability in CHOSEN_BY_AUTO):
            continue
        message = f"only {' and '.join(able)} can use {feature}, and this is {engine.kind}"
        fix = f"engine.kind={' or '.join(able)}, or {alternative}"
        yield Clash([key, ("engine", "kind")], message, fix)


def _deepspeed_file(recipe: Recipe) -> Iterator[Clash]:
    engine = recipe.engine
    if engine.config is None or engine.kind == "auto" or not ENGINES[engine.kind].is_deepspeed:
        return
    try:
        deepspeed_file.read(user_path(engine.config), engine.kind, engine.offload)
    except UserError as error:
        faults = error.errors if isinstance(error, UserErrors) else [error]
        for fault in faults:
            head = f"{fault.where}: {fault.message}" if fault.where else fault.message
            yield Clash([("engine", "config")], head, fault.fix)


def _device(recipe: Recipe) -> Iterator[Clash]:
    attention = ("model", "attention")
    if recipe.model.attention == "flash_attention_2":
        if recipe.device == "cpu":
            yield Clash([attention, ("device",)], "flash attention needs a GPU", "attention=sdpa")
        if recipe.model.dtype == "float32":
            message = "flash attention computes in 16 bits only"
            yield Clash(
                [attention, ("model", "dtype")], message, "dtype=bfloat16, or attention=sdpa"
            )


def _stage_names(recipe: Recipe) -> Iterator[Clash]:
    numbers: dict[str, list[int]] = {}
    for number, stage in enumerate(recipe.stages):
        numbers.setdefault(stage.name, []).append(number)
        if stage.name in RESERVED_NAMES:
            message = f"the run folder needs {stage.name} for something else"
            yield Clash([("stages", number, "name")], message, "choose another name")
    for name, same in numbers.items():
        if len(same) > 1:
            keys: list[Key] = [("stages", number, "name") for number in same]
            yield Clash(keys, f"two stages are named {name}", "choose another name for one of them")


def _stage(recipe: Recipe, number: int) -> Iterator[Clash]:
    stage, at = recipe.stages[number], ("stages", number)
    yield from check_train(recipe, stage, (*at, "train"))
    yield from _batch(recipe, stage, at)
    yield from _sources(stage.data, stage.kind, at, (*at, "data", "sources"))
    yield from _changing_weights(stage, at)
    yield from _preference(stage.kind, stage.preference, at)
    yield from check_distill(recipe, stage, at)
    yield from check_method(recipe, stage, at)
    yield from check_regularize(recipe, number, at)
    if (reason := stage.method.traits.cannot_merge) and recipe.merges(stage):
        message = f"{stage.method.kind} cannot be merged: {reason}"
        fix = "make it the last stage, with output.merge=false"
        yield Clash([(*at, "method", "kind"), ("output", "merge")], message, fix)


def _preference(kind: str, preference: PreferenceSettings, at: Key) -> Iterator[Clash]:
    known = OBJECTIVES[kind].preference_keys
    defaults = PreferenceSettings()
    for name in type(preference).model_fields.keys() - known:
        if getattr(preference, name) == getattr(defaults, name):
            continue  # a resolved recipe names every key
        fix = f"remove it; {kind} reads {', '.join(sorted(known)) or 'no key of preference'}"
        yield Clash([(*at, "kind"), (*at, "preference", name)], f"{kind} has no {name}", fix)
    if preference.label_smoothing and preference.loss not in ("sigmoid", "robust"):
        keys: list[Key] = [(*at, "preference", name) for name in ("label_smoothing", "loss")]
        what = f"{preference.loss} has no label smoothing"
        yield Clash(keys, what, "loss=sigmoid or robust, or remove label_smoothing")


def _batch(recipe: Recipe, stage: Stage, at: Key) -> Iterator[Clash]:
    ranks, train = recipe.launch.processes, stage.train
    if ranks == "auto":
        ranks = 1  # with any number of ranks, a step needs at least one micro-batch
    try:
        accumulation(train.global_batch_size, ranks, train.micro_batch)
    except UserError as error:
        keys: list[Key] = [
            (*at, "train", "global_batch_size"),
            (*at, "train", "micro_batch_size"),
        ]
        if recipe.launch.processes != "auto":
            keys.append(("launch", "processes"))
        yield Clash(keys, error.message, error.fix)


def _sources(data: Data, kind: str, owner: Key, at: Key) -> Iterator[Clash]:
    weighted = [number for number, source in enumerate(data.sources) if source.weight is not None]
    if weighted and len(weighted) < len(data.sources):
        missing = [n for n in range(len(data.sources)) if n not in weighted]
        keys: list[Key] = [(*at, weighted[0], "weight"), (*at, missing[0], "weight")]
        yield Clash(keys, "some sources have a weight and some do not", "set all weights, or none")
    keys_of_sources: list[Key] = [(*at, number) for number in range(len(data.sources))]
    keys_of_sources.append((*at[:-1], "replay"))
    for source_key, source in zip(keys_of_sources, data.all_sources, strict=False):
        if source.format != "auto" and (mismatch := format_mismatch(kind, source.format)):
            yield Clash([(*owner, "kind"), (*source_key, "format")], *mismatch)
        if source.loss_weight != 1.0 and not OBJECTIVES[kind].sums_token_losses:
            message = f"{kind} has no cross-entropy of single tokens to weigh"
            yield Clash([(*owner, "kind"), (*source_key, "loss_weight")], message, "remove it")


def _changing_weights(stage: Stage, at: Key) -> Iterator[Clash]:
    """Errors in weights by step: unordered, without a known number of steps, or all 0."""
    data, train, sources = stage.data, stage.train, (*at, "data", "sources")
    lists = {n: s.weight for n, s in enumerate(data.sources) if isinstance(s.weight, list)}
    for number, entries in lists.items():
        after, here = [entry.after_steps for entry in entries], (*sources, number, "weight")
        if after[0] != 0 or after != sorted(set(after)):
            fix = "start with after_steps: 0, in ascending order"
            yield Clash([here], f"the steps are {after}", fix)
            return
        if train.steps is not None and after[-1] >= train.steps:
            keys: list[Key] = [here, (*at, "train", "steps")]
            message = f"the weight after {after[-1]} steps never applies in {train.steps} steps"
            yield Clash(keys, message, "remove it, or train longer")
        if train.epochs is not None:
            keys = [here, (*at, "train", "epochs")]
            message = "the length of an epoch depends on the weights, which change"
            yield Clash(keys, message, "set train.steps or train.tokens instead")
        if not any(entry.weight for entry in entries):
            yield Clash([here], "the weight is always 0", "remove the source")
    for steps, weights in data.weights_by_step.items() if lists else ():
        if not any(weights):
            yield Clash(
                [sources], f"after {steps} steps all weights are 0", "set one of them above 0"
            )


def _evaluation(recipe: Recipe) -> Iterator[Clash]:
    for name, held_out in recipe.evaluation.sets.items():
        at = ("evaluation", "sets", name)
        for number, source in enumerate(held_out.sources):
            if isinstance(source.weight, list):
                message = "an evaluation set has no steps"
                yield Clash([(*at, "sources", number, "weight")], message, "set a single weight")
            if source.loss_weight != 1.0:
                message = "the loss of an evaluation set counts every token alike"
                yield Clash([(*at, "sources", number, "loss_weight")], message, "remove it")
        if held_out.calibration and not OBJECTIVES[held_out.kind].sums_token_losses:
            message = f"{held_out.kind} has no cross-entropy of single tokens to calibrate"
            yield Clash([(*at, "kind"), (*at, "calibration")], message, "calibration=false")
        yield from _sources(held_out, held_out.kind, at, (*at, "sources"))
        yield from _preference(held_out.kind, held_out.preference, at)
        yield from check_distill(recipe, held_out, at)
    if recipe.evaluation.tasks is not None:
        yield from _tasks(recipe, recipe.evaluation.tasks)
    measured = recipe.evaluation.measured_names
    for name in recipe.evaluation.gates:
        if name not in measured:
            keys: list[Key] = [("evaluation", "gates", name)]
            fix = f"use one of {', '.join(measured)}" if measured else "add it to evaluation.sets"
            yield Clash(keys, f"there is no set or task named {name}", fix)


def _tasks(recipe: Recipe, tasks: Tasks) -> Iterator[Clash]:
    yield from check_tasks(tasks, recipe.evaluation.sets)
    for number, stage in enumerate(recipe.stages):
        if stage.method.added_tokens:
            keys: list[Key] = [("stages", number, "method", "kind"), ("evaluation", "tasks")]
            message = "the harness cannot call a model in training that reads virtual tokens"
            yield Clash(keys, message, "remove evaluation.tasks, or use another method")
