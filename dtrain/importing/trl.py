"""Configs of TRL's scripts: which trainer they are for, and their datasets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.config.data import Source
from dtrain.config.objectives import CONTENT
from dtrain.core.errors import UserError
from dtrain.data.records import detect_source_format
from dtrain.data.sources import files_here
from dtrain.importing.foreign_config import STAGE, ForeignConfig
from dtrain.importing.method import method
from dtrain.importing.model import model
from dtrain.importing.sources import SUBSET, held_out_set, sources_of
from dtrain.importing.training import TrainerDefaults, intervals, training

SFT = TrainerDefaults(learning_rate=2e-5)
PREFERENCES = replace(SFT, learning_rate=1e-6)
LORA = {"r": 16, "alpha": 32, "dropout": 0.05}
DATA, PREFERENCE = STAGE + "data.", STAGE + "preference."
PAIR_LOSSES = ("sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down")
OF_PAIRS = ("beta", "precompute_ref_log_probs", "label_smoothing", "ref_model_name_or_path")
ONLINE = (
    "num_generations",
    "reward_funcs",
    "reward_model_path",
    "max_completion_length",
    "kl_coef",
)


def read(config: ForeignConfig, processes: int) -> None:
    """Fill the recipe from a config of TRL.

    Raises:
        UserError: it trains what dtrain cannot.
    """
    if key := config.name(*ONLINE):
        message = "is of a trainer that generates answers, which dtrain has not"
        raise UserError(message, where=config.where(key), fix="sft, dpo and kto exist")
    model(config, checkpointing=True)
    method(config, "lora" if config.get("use_peft") else "full", LORA)
    sources = _sources(config)
    row_format = sources[0]["format"] if sources else "auto"
    kind = _objective(config, row_format)
    for source in sources:
        _set_text_column(config, source, kind)
    if kind == "cpt" and (column := config.get("dataset_text_field")):
        config.note(config.source + "columns.text", column, "dataset_text_field")
    config.leave("dataset_text_field", why="the rows are no plain texts")
    config.stage["data"] = {"sources": sources}
    _data(config, kind, row_format)
    defaults = SFT if kind in ("sft", "cpt") else PREFERENCES
    training(config, defaults, processes)
    _held_out(config)
    intervals(config, defaults)


def _sources(config: ForeignConfig) -> list[dict[str, Any]]:
    split = str(config.get("dataset_train_split") or "train")
    if config.name("dataset_train_split"):
        config.note(config.source + "split", split, "dataset_train_split")
    config.leave("dataset_config", why=SUBSET)
    entries = config.groups("datasets")
    if not entries:
        name = config.get("dataset_name")
        if not name:
            raise UserError("names no dataset", where=str(config.path), fix="set dataset_name")
        config.note(config.source + "path", name, "dataset_name")
        group = config.group("", {"split": split} if split != "train" else {})
        return sources_of(group, _format_of(str(name)), {}, [str(name)])
    return [source for data in entries for source in _entry(data)]


def _entry(data: ForeignConfig) -> list[dict[str, Any]]:
    key = data.name("data_files") or "path"
    folder = str(data.get("data_dir") or "")
    paths = [str(Path(folder, path)) for path in data.paths(key)]
    data.note(data.source + "path", paths[0] if len(paths) == 1 else paths, key)
    data.leave("path", why="data_files names the files")
    result = sources_of(data, _format_of(paths[0]), {}, paths)
    if weight := data.number("fraction"):
        data.note(data.source + "weight", weight, "fraction")
        for source in result:
            source["weight"] = weight / len(result)
    data.leave_rest()
    return result


def _format_of(path: str) -> str:
    """The format of the rows, if the files are here."""
    files = files_here(Source(path=path))
    try:
        return detect_source_format(files, {}) if files else "auto"
    except UserError:
        return "auto"


def _objective(config: ForeignConfig, row_format: str) -> str:
    """The stage's kind: TRL's file does not name it, but the command that reads it."""
    path, content = STAGE + "kind", CONTENT.get(row_format)
    kinds = {"text": "cpt", "conversation": "sft", "preference": "dpo", "labeled answer": "kto"}
    kind, why = kinds.get(str(content), ""), f"the rows are of format {row_format}"
    if not kind:
        is_kto = config.name("desirable_weight", "undesirable_weight")
        kind = "kto" if is_kto else "dpo" if config.name(*OF_PAIRS) else "sft"
        if kind == "sft" and config.name("dataset_text_field"):
            kind = "cpt"
        why = "by the keys; correct it if the command was another"
    if config.get("loss_type") == "simpo":
        kind, why = "simpo", "loss_type"
    config.put(path, kind, why=why)
    if kind not in ("sft", "cpt"):
        _preference(config, kind)
    return kind


def _preference(config: ForeignConfig, kind: str) -> None:
    config.copy("beta", path=PREFERENCE + "beta")
    if kind == "kto":
        config.copy("desirable_weight", path=PREFERENCE + "desirable_weight")
        config.copy("undesirable_weight", path=PREFERENCE + "undesirable_weight")
    if kind == "simpo":
        config.copy("simpo_gamma")
    if kind != "dpo":
        return
    losses = config.names("loss_type") or ["sigmoid"]
    pairs = [loss for loss in losses if loss in PAIR_LOSSES]
    if len(pairs) != 1 or set(losses) - {*pairs, "sft"}:
        fix = f"one of {', '.join(PAIR_LOSSES)}, and sft"
        raise UserError(f"{losses} have no counterpart", where=config.where("loss_type"), fix=fix)
    config.put(PREFERENCE + "loss", pairs[0], "loss_type")
    if "sft" in losses:
        weights = config.numbers("loss_weights") or [1.0] * len(losses)
        if len(weights) != len(losses):
            raise UserError("needs a weight for each loss", where=config.where("loss_weights"))
        weight = weights[losses.index("sft")] / weights[losses.index(pairs[0])]
        why = "the weight of sft, relative to the other loss"
        config.put(PREFERENCE + "sft_weight", weight, "loss_weights", why=why)
    config.copy("label_smoothing", path=PREFERENCE + "label_smoothing")
    config.copy("rpo_alpha")
    config.copy("precompute_ref_log_probs")


def _set_text_column(config: ForeignConfig, source: dict[str, Any], kind: str) -> None:
    column = str(config.get("dataset_text_field") or "text")
    if kind == "cpt":
        source["format"] = "text"
        source |= {"columns": {"text": column}} if column != "text" else {}


def _data(config: ForeignConfig, kind: str, row_format: str) -> None:
    length = ("max_length", "max_seq_length")
    config.put(DATA + "sequence_length", int(config.number(*length) or 1024), *length)
    packs = bool(config.get("packing"))
    config.put(DATA + "packing", packs, "packing")
    if kind == "sft":
        _trained_turns(config, row_format)
    template = config.get("chat_template_path")
    if isinstance(template, str) and template.endswith((".jinja", ".jinja2", ".j2")):
        config.put(DATA + "template", template, "chat_template_path")


def _trained_turns(config: ForeignConfig, row_format: str) -> None:
    path, keys = DATA + "train_on", ("assistant_only_loss", "completion_only_loss")
    if config.get("assistant_only_loss") or config.get("completion_only_loss"):
        config.put(path, "all", *keys)
    elif row_format in ("messages", "sharegpt"):
        why = (
            "without assistant_only_loss TRL trains on every turn; system prompts have no loss here"
        )
        config.put(path, "all+user+tool", "assistant_only_loss", why=why)
    elif row_format == "auto":
        why = "only answers have loss; TRL trains on all turns of messages: all+user+tool"
        config.put(path, "all", why=why, changed=True)
    elif config.get("completion_only_loss") is False:
        config.put(path, "all+user", "completion_only_loss")
    config.leave(*keys, why="only answers have loss")


def _held_out(config: ForeignConfig) -> None:
    key = "dataset_test_split"
    is_evaluated = str(config.get("eval_strategy") or "no") not in ("no", "False")
    sources = config.stage["data"]["sources"]
    if is_evaluated and len(sources) == 1 and not files_here(Source(path=sources[0]["path"])):
        split = str(config.get(key) or "test")
        held_out = held_out_set(config, [sources[0] | {"split": split}])
        config.assign("evaluation.sets.heldout", held_out)
        config.note("evaluation.sets.heldout.sources[].split", split, key)
    config.leave(key, why="files have no splits; name held-out rows in evaluation.sets")
