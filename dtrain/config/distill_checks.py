"""Checks of the group `distill` of a stage or of an evaluation set."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.config.clash import Clash
from dtrain.config.distill import DistillSettings
from dtrain.config.methods import TRAITS
from dtrain.config.objectives import OBJECTIVES
from dtrain.config.schema import EvaluationSet, Recipe, Stage
from dtrain.config.yaml_document import Key, dotted


def check_distill(recipe: Recipe, settings: Stage | EvaluationSet, at: Key) -> Iterator[Clash]:
    """Errors in what a stage or an evaluation set, whose key is `at`, learns from a teacher."""
    kind, group = settings.kind, settings.distill
    keys: list[Key] = [(*at, "kind"), (*at, "distill")]
    if OBJECTIVES[kind].needs_teacher and group is None:
        yield Clash(keys, f"{kind} needs a teacher", "distill={teacher: FOLDER or hub id}")
    if group is None:
        return
    if not OBJECTIVES[kind].needs_teacher:
        yield Clash(keys, f"{kind} learns from no teacher", "kind=distill, or remove distill")
        return
    default_beta = DistillSettings.model_fields["beta"].default
    if group.loss != "jsd" and group.beta != default_beta:
        keys = [(*at, "distill", "beta"), (*at, "distill", "loss")]
        yield Clash(keys, f"{group.loss} has no beta", "loss=jsd, or remove beta")
    if group.top_k is not None and group.loss != "forward_kl":
        keys = [(*at, "distill", "top_k"), (*at, "distill", "loss")]
        message = f"{group.loss} needs the probabilities of all tokens"
        yield Clash(keys, message, "loss=forward_kl, or remove top_k")
    if group.teacher_folder is None:
        yield from _own_base(recipe, settings, group, at)


def _own_base(
    recipe: Recipe, settings: Stage | EvaluationSet, group: DistillSettings, at: Key
) -> Iterator[Clash]:
    teacher: Key = (*at, "distill", "teacher")
    if isinstance(settings, Stage) and group.ce_weight == 0:
        message = "the stage starts as its own teacher, so there is nothing to learn"
        fix = "another teacher, or a ce_weight above 0 to learn the rows and stay near the base"
        yield Clash([teacher, (*at, "distill", "ce_weight")], message, fix)
    for number, stage in enumerate(recipe.stages):
        concerns = stage is settings or isinstance(settings, EvaluationSet)
        is_kept = stage.method.base_when_disabled or group.top_k is not None
        if not concerns or is_kept:
            continue
        if stage.method.traits.base_when_disabled:
            method: Key = ("stages", number, "method", "from_adapter")
            message = f"the stage {stage.name} starts from its base with an adapter"
            fix = "merge that adapter, and start from the merged model"
        else:
            method = ("stages", number, "method", "kind")
            message = f"{stage.method.kind} does not keep the model that the stage {stage.name} "
            message += "starts from"
            kinds = (kind for kind, traits in TRAITS.items() if traits.base_when_disabled)
            fix = f"method.kind={' or '.join(kinds)}"
        stored = f"{dotted((*at, 'distill'))}.top_k=64"
        if group.loss != "forward_kl":
            stored += " with loss=forward_kl"
        fix += f"; or {stored}, whose values are stored before the training"
        yield Clash([teacher, method], message, fix)
