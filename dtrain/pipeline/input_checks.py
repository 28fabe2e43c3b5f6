"""Check all stages of a recipe before the first one trains, as far as no torch is needed.

`dtrain check`, `submit` and `run` call this; `stage_checks` does the rest on the built model.
"""

from __future__ import annotations

from pathlib import Path

from dtrain.config.schema import Recipe, Stage
from dtrain.core.cache_paths import hub_id, local_path, sample_name, user_path
from dtrain.core.check_report import CheckReport
from dtrain.core.errors import UserError
from dtrain.core.run_dir import RunDir
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.core.weight_files import read_header, undownloaded
from dtrain.data.check_rows import check_rows, data_groups, reads_template
from dtrain.data.end_of_turn import check_template, closes_turns
from dtrain.evaluation.metric import check_metrics
from dtrain.evaluation.prompts import check_prompts
from dtrain.models.check_base import (
    LocalModel,
    check_new,
    find_model,
    known_tokens,
    open_model,
)
from dtrain.models.peft_format import WEIGHTS, read_adapter_config
from dtrain.planning.architectures import shape_of
from dtrain.planning.check_methods import check_methods, check_names
from dtrain.planning.known_models import check_trainable, fetch_command, find_config
from dtrain.planning.shapes import ModelShape
from dtrain.samples.make import check_known

NOT_CHECKED = (
    "not checked: rows after the first of each file, whether the base can be packed, and its "
    "layers as built; `dtrain run` does all that before the first stage trains"
)


def check_inputs(recipe: Recipe) -> CheckReport:
    """Check data, templates, base, module names, adapters and teachers of all stages.

    Returns:
        Its errors, and notes of what was left out or cannot be checked here.
    """
    report = CheckReport()
    for name in sorted(samples_of(recipe)):
        with report.collect():
            check_known(name)
    base, *_ = [_check_model(*model, report) for model in recipe.models]
    check_rows(recipe, report)
    check_prompts(recipe, report)
    with report.collect():
        check_metrics(recipe)
    is_broken = any(error.where.startswith("model.base") for error in report.errors)
    _check_templates(recipe, base.folder if base else None, report, notes=not is_broken)
    if not is_broken:
        _check_modules(recipe, base, report)
    if recipe.model.tokens is not None and base is not None:
        with report.collect():
            check_new(recipe.model.tokens.words, known_tokens(base.folder))
    for stage in recipe.stages:
        with report.collect(f"stages.{stage.name}.method.from_adapter"):
            _check_initial_adapter(stage)
    with report.collect("output.reuse"):
        if recipe.output.reuse is not None:
            RunDir(user_path(recipe.output.reuse)).check_exists()
    return report


def samples_of(recipe: Recipe) -> set[str]:
    """Names of the shipped samples that a recipe uses."""
    addresses = [recipe.model.base, *recipe.teachers.values()]
    addresses += [s.path for _, _, data in data_groups(recipe) for s in data.all_sources]
    addresses += [prompts.path for prompts in recipe.evaluation.generation.values()]
    return {name for address in addresses if (name := sample_name(address))}


def _check_model(
    key: str, address: str, revision: str | None, report: CheckReport
) -> LocalModel | None:
    """Check a model's files if they are here."""
    with report.collect(key):
        folder = find_model(address, revision)
        if folder is None:
            report.note(_absent(key, address, revision))
            check_trainable(address)
            return None
        if hub_id(address) and (problem := undownloaded(address, revision)):
            raise UserError(problem, fix=fetch_command(address, revision))
        return open_model(folder)
    return None


def _absent(key: str, address: str, revision: str | None) -> str:
    """The note of a model that is not on this machine."""
    unread = "its files, template and tokenizer were not checked"
    if sample_name(address) is not None:
        return f"{key}: {unread}: the run builds {address}"
    command = fetch_command(address, revision)
    return f"{key}: {unread}: {address} is not on this machine; `{command}` downloads it"


def _check_templates(
    recipe: Recipe, base: Path | None, report: CheckReport, *, notes: bool
) -> None:
    for key, kind, data in data_groups(recipe):
        if not reads_template(kind, data):
            continue
        errors, where = len(report.errors), f"{key}.template: {data.template}"
        with report.collect(key, "."):
            check_template(data.template, base)
        if len(report.errors) > errors:
            continue
        closes = closes_turns(data.template, base)
        if closes is None and notes:
            report.note(f"{where}: not checked here; `dtrain data scan` checks it")
        elif closes is False and key.startswith("stages."):
            report.note(
                f"warning: {where}: the end of a turn has no loss: the model will not learn to stop"
            )


def _check_modules(recipe: Recipe, base: LocalModel | None, report: CheckReport) -> None:
    shape = _shape(recipe, base)
    if shape is not None:
        check_methods(recipe, shape, report)
    elif base is not None:
        check_names(recipe, base.shapes, report)
    else:
        report.note(
            "names of layers (target_modules, modules_to_save, patterns): not checked, as the base "
            "is not on this machine and its layers are not known without its files; the run checks "
            "them before the first stage trains"
        )


def _shape(recipe: Recipe, base: LocalModel | None) -> ModelShape | None:
    """The base's shape; None if its architecture or its config is not known here."""
    try:
        if base is not None:
            return shape_of(base.config, str(base.folder))
        return shape_of(*find_config(recipe.model.base))
    except UserError:
        return None


def _check_initial_adapter(stage: Stage) -> None:
    """Check the adapter that a stage continues, as far as its config says.

    Raises:
        UserError: it is no adapter, its weights are broken, or has another size.
    """
    adapter = stage.method.adapter
    if adapter is None or adapter.initial_adapter is None:
        return
    folder = local_path(adapter.initial_adapter)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    theirs, ours = read_adapter_config(folder), adapter.peft_config()
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"no {WEIGHTS} in it", where=str(folder))
    read_header(folder / WEIGHTS)
    for key in ("peft_type", "r", "init_r", "lora_alpha", "use_rslora", "use_dora"):
        if ours.get(key) != theirs.get(key) and (ours.get(key) or theirs.get(key)):
            name = "alpha" if key == "lora_alpha" else key
            raise UserError(
                f"{name}: {theirs.get(key)!r} in the adapter, {ours.get(key)!r} here",
                where=str(folder / ADAPTER_CONFIG),
                fix="write the adapter's settings into the recipe, or start a new adapter",
            )
